"""The app's page: the attributes on the left, and on the right the tabs that generate, edit and inpaint images."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from ..pipelines.attributes import AttributeValue
from ..storage import first_line
from .server import Page
from .studio import Control, Settings, Studio, read_image, union

NUM_IMAGES, MAX_IMAGES = 8, 16
# The side of an image to be inpainted on the page, in pixels; a small image has too few pixels for a brush.
CANVAS = 512
GENERATE, CHANGE, INPAINT = "generate", "change", "inpaint"
VARY, EDIT = "Image to image", "Edit attributes"
ACCENT = "#e0457b"

# Fonts of the system only, so that the page needs no network.
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "monospace"]
CSS = """
.gradio-container > main { max-width: 1280px; width: 100%; margin: 0 auto; }
.title h1 { font-size: 1.4rem; margin: 0; }
.title p, .hint p { color: var(--body-text-color-subdued); margin: 0; }
.form:has(> fieldset.choice) { border: none; }
fieldset.choice { display: flex; align-items: center; padding: 2px 0 !important; border: none !important; }
fieldset.choice > span { flex: 1; margin: 0; font-size: 0.9rem; }
fieldset.choice > .wrap { flex: none; flex-wrap: nowrap; gap: 0; border-radius: 6px; overflow: hidden; }
fieldset.choice label { padding: 2px 11px; border-radius: 0; box-shadow: none; font-size: 0.85rem; }
fieldset.choice label { background: var(--border-color-primary); color: var(--body-text-color-subdued); }
fieldset.choice label.selected { background: var(--neutral-400); color: white; }
fieldset.choice label.selected:not(:first-child) { background: var(--primary-500); }
fieldset.choice label:has(:focus-visible) { outline: 2px solid var(--primary-500); outline-offset: -2px; }
fieldset.choice input { position: absolute; opacity: 0; width: 0; }
fieldset.choice label > span { margin: 0; }
#how .wrap { gap: 6px; flex-wrap: nowrap; }
#how label { padding: 5px 10px; font-size: 0.9rem; }
#upload img { width: 100%; object-fit: contain; }
.gallery { min-height: 440px; }
.gallery .grid-wrap { max-height: none; }
"""

Data = dict[Any, Any]


@dataclass
class Panel:
    """The controls on the left, which all tabs share."""

    studio: Studio
    attributes: dict[str, gr.Radio | gr.Dropdown]
    num_images: gr.Slider
    seed: gr.Number
    new_seed: gr.Checkbox
    steps: gr.Slider
    guidance: gr.Slider

    @property
    def inputs(self) -> set[Any]:
        """The components of the panel that an event needs to generate images."""
        return {*self.attributes.values(), self.num_images, self.seed, self.new_seed, self.steps, self.guidance}

    def requested(self, data: Data) -> dict[str, AttributeValue]:
        """Return the requested attributes, those that are not left open."""
        choices = [(control, data[self.attributes[control.name]]) for control in self.studio.controls]
        return {control.name: control.values[number][1] for control, number in choices if number}

    def settings(self, data: Data) -> Settings:
        """Return the settings of sampling, with a random seed if "Randomize seed" is on or there is none."""
        seed = data[self.seed]
        if seed is None or data[self.new_seed]:
            seed = random.randrange(2**31)
        return Settings(int(data[self.num_images]), int(seed), int(data[self.steps]), float(data[self.guidance]))


def build_page(studio: Studio, name: str) -> gr.Blocks:
    """Build the page of a model called `name`."""
    with Page(title=f"dit_hf: {name}", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# {name}\nImages from a latent Diffusion Transformer", elem_classes="title")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                panel = _panel(studio)
            with gr.Column(scale=5, min_width=420), gr.Tabs(selected=GENERATE) as tabs:
                with gr.Tab("Generate", id=GENERATE):
                    to_edit, to_inpaint, generated, selected = _generate_tab(panel)
                with gr.Tab("Edit", id=CHANGE):
                    upload = _edit_tab(panel)
                with gr.Tab("Inpaint", id=INPAINT):
                    editor = _inpaint_tab(panel)

        # The buttons below the gallery hand the selected image to another tab. They are connected here, because the
        # components of all tabs exist only now.
        def selected_image(gallery: list[tuple[str, str]] | None, index: int) -> Image.Image:
            with _readable():
                if not gallery:
                    raise ValueError("generate some images first, then select one")
                # A new series may be shorter than the one in which an image was selected.
                return read_image(gallery[min(index, len(gallery) - 1)][0])

        def edit(gallery: list[tuple[str, str]] | None, index: int) -> tuple[gr.Tabs, Image.Image]:
            return gr.Tabs(selected=CHANGE), selected_image(gallery, index)

        def inpaint(gallery: list[tuple[str, str]] | None, index: int) -> tuple[gr.Tabs, Image.Image]:
            return gr.Tabs(selected=INPAINT), _canvas(studio, selected_image(gallery, index))

        to_edit.click(edit, [generated, selected], [tabs, upload])
        to_inpaint.click(inpaint, [generated, selected], [tabs, editor])
    return page


def look() -> dict[str, Any]:
    """Return theme and styles as options of `gr.Blocks.launch`."""
    theme = gr.themes.Soft(primary_hue="rose", neutral_hue="slate", font=FONT, font_mono=MONO).set(
        body_background_fill="*neutral_50",
        block_border_width="1px",
        block_shadow="none",
        **{
            f"block_{part}_{what}": value
            for part in ("label", "title")
            for what, value in (
                ("background_fill", "none"),
                ("background_fill_dark", "none"),
                ("text_color", "*body_text_color"),
                ("text_color_dark", "*body_text_color"),
                ("text_weight", "500"),
            )
        },
        block_title_padding="0",
    )
    return {"theme": theme, "css": CSS, "footer_links": []}


def _panel(studio: Studio) -> Panel:
    """Build the controls on the left."""
    # 1. Attributes, one accordion a group; only the first group is open, or the page would be very long.
    attributes: dict[str, gr.Radio | gr.Dropdown] = {}
    if studio.controls:
        with gr.Row():
            summary = gr.Markdown(_summary([]))
            clear = gr.Button("Clear", size="sm", min_width=60, scale=0)
        groups = list(dict.fromkeys(control.group for control in studio.controls))
        for group in groups:
            with gr.Accordion(group if len(groups) > 1 else "Attributes", open=group == groups[0]):
                for control in studio.controls:
                    if control.group == group:
                        attributes[control.name] = _choice(control)

    # 2. Settings of sampling. An unconditional model has no guidance.
    with gr.Accordion("Sampling"):
        num_images = gr.Slider(1, MAX_IMAGES, NUM_IMAGES, step=1, label="Images")
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=110)
            new_seed = gr.Checkbox(True, label="Randomize seed", min_width=110)
        steps = gr.Slider(1, min(100, studio.num_levels), min(25, studio.num_levels), step=1, label="Steps")
        highest = max(8.0, 2 * studio.guidance_scale)
        guidance = gr.Slider(
            *(1.0, highest, studio.guidance_scale), step=0.1, label="Guidance", visible=bool(studio.controls)
        )
    panel = Panel(studio, attributes, num_images, seed, new_seed, steps, guidance)

    # 3. The summary of the requested attributes, and the button that clears them.
    if attributes:

        def summarize(data: Data) -> str:
            requested = panel.requested(data)
            controls = [control for control in studio.controls if control.name in requested]
            return _summary([_describe(control, requested[control.name]) for control in controls])

        choices = list(attributes.values())
        gr.on(
            [choice.change for choice in choices], summarize, {*choices}, summary, queue=False, show_progress="hidden"
        )
        clear.click(lambda: [0] * len(choices), None, choices, queue=False, show_progress="hidden")
    return panel


def _choice(control: Control) -> gr.Radio | gr.Dropdown:
    """Return the component of a control, with the index of the choice as its value; many choices are a list."""
    choices = [(label, number) for number, (label, _) in enumerate(control.values)]
    kind = gr.Radio if len(choices) <= 3 else gr.Dropdown
    return kind(choices, value=0, label=control.label, elem_classes="choice")


def _describe(control: Control, value: AttributeValue) -> str:
    """Describe a requested attribute for the summary, e.g. `not Smiling`."""
    if isinstance(value, bool):
        return control.label if value else f"not {control.label}"
    return f"{control.label}: {next(label for label, choice in control.values if choice == value)}"


def _summary(attributes: list[str]) -> str:
    """Return the line above the attributes."""
    return f"**Requested:** {', '.join(attributes) or 'any'}"


def _generate_tab(panel: Panel) -> tuple[gr.Button, gr.Button, gr.Gallery, gr.State]:
    """Build the tab of new images; return its buttons to edit and inpaint, its gallery and the selected index."""
    button = gr.Button("Generate", variant="primary", elem_id="draw")
    gallery = _gallery("drawn", columns=4)
    with gr.Row():
        to_edit = gr.Button("Edit the selected image", size="sm")
        to_inpaint = gr.Button("Inpaint the selected image", size="sm")
    selected = gr.State(0)

    def generate(data: Data, progress: gr.Progress = gr.Progress()) -> tuple[list[Image.Image], int, int]:  # noqa: B008
        with _readable():
            settings = panel.settings(data)
            images = panel.studio.generate(panel.requested(data), settings, _steps(progress))
            return images, settings.seed, 0  # the first image is selected

    def select(event: gr.SelectData) -> int:
        return event.index

    _on_click(button, generate, panel.inputs, [gallery, panel.seed, selected])
    gallery.select(select, None, selected, queue=False, show_progress="hidden")
    return to_edit, to_inpaint, gallery, selected


def _edit_tab(panel: Panel) -> gr.Image:
    """Build the tab of image to image and attribute edits; return its upload."""
    studio = panel.studio
    gr.Markdown("Vary an image, or edit those of its attributes that are set on the left.", elem_classes="hint")
    with gr.Row():
        with gr.Column(scale=2):
            upload = _upload(studio)
            mode = gr.Radio(
                [VARY, EDIT],
                value=VARY,
                show_label=False,
                container=False,
                elem_id="how",
                visible=bool(studio.controls),
            )
            strength = gr.Slider(0.05, 1, 0.6, step=0.05, label="Strength", info="1 keeps nothing of the image")
            amount = gr.Slider(
                *(0.1, 3, 1),
                step=0.1,
                label="Amount",
                info="of the attributes on the left",
                visible=False,
            )
            button = gr.Button("Generate", variant="primary", elem_id="change")
        with gr.Column(scale=3):
            gallery = _gallery("changed", columns=3)

    def switch(mode: str) -> tuple[gr.Slider, gr.Slider]:
        return gr.Slider(visible=mode == VARY), gr.Slider(visible=mode == EDIT)

    def edit(data: Data, progress: gr.Progress = gr.Progress()) -> tuple[list[tuple[Image.Image, str]], int]:  # noqa: B008
        with _readable():
            if data[upload] is None:
                raise ValueError("upload an image first, or generate one and select it")
            image = read_image(data[upload])
            settings, requested, on_step = panel.settings(data), panel.requested(data), _steps(progress)
            if data[mode] == EDIT:
                # An inversion has no steps of its own to show.
                progress(0, desc="inverting the image to noise")
                images = studio.edit(image, requested, data[amount], settings, on_step)
            else:
                images = studio.vary(image, requested, data[strength], settings, on_step)
            return [(studio.fit(image), "before"), *((one, "after") for one in images)], settings.seed

    mode.change(switch, mode, [strength, amount], queue=False, show_progress="hidden")
    _on_click(button, edit, {*panel.inputs, upload, mode, strength, amount}, [gallery, panel.seed])
    return upload


def _inpaint_tab(panel: Panel) -> gr.ImageEditor:
    """Build the tab of inpainting; return its editor."""
    studio = panel.studio
    gr.Markdown("Paint over the part of an image that is to be inpainted; the rest stays.", elem_classes="hint")
    with gr.Row():
        with gr.Column(scale=3):
            editor = gr.ImageEditor(
                type="pil",
                image_mode="RGBA",
                sources=["upload", "clipboard"],
                show_label=False,
                elem_id="editor",
                brush=gr.Brush(default_size=48, colors=[ACCENT], color_mode="fixed"),
                layers=False,
                transforms=[],
                canvas_size=(CANVAS, CANVAS),
                height=CANVAS + 60,
            )
            button = gr.Button("Inpaint", variant="primary", elem_id="inpaint")
        with gr.Column(scale=2):
            gallery = _gallery("painted", columns=2)

    def upload(value: dict[str, Any]) -> Image.Image:
        with _readable():
            return _canvas(studio, value["background"])

    def inpaint(data: Data, progress: gr.Progress = gr.Progress()) -> tuple[list[Image.Image], int]:  # noqa: B008
        with _readable():
            value = data[editor] or {}
            image = value.get("background")
            if image is None:
                raise ValueError("there is no image to inpaint: upload a PNG or JPEG, or generate one and select it")
            mask = union(value["layers"], image.size)
            settings, requested = panel.settings(data), panel.requested(data)
            images = studio.inpaint(image.convert("RGB"), mask, requested, settings, _steps(progress))
            return images, settings.seed

    editor.upload(upload, editor, editor, show_progress="hidden")
    _on_click(button, inpaint, {*panel.inputs, editor}, [gallery, panel.seed])
    return editor


def _upload(studio: Studio) -> gr.Image:
    """Return an upload that shows an image as the model gets it, and refuses broken files with a message."""
    upload = gr.Image(
        type="filepath",
        image_mode=None,
        format="png",
        sources=["upload", "clipboard"],
        label="An image",
        height=320,
        elem_id="upload",
    )
    original = upload.preprocess

    def preprocess(payload: Any) -> Any:
        try:
            return original(payload)
        except Exception as error:  # broken bytes make decoders raise anything
            name = getattr(payload, "orig_name", None) or "this file"
            raise _message(f"{name} cannot be opened as an image; take a PNG or JPEG") from error

    def fit(path: str) -> Image.Image:
        with _readable():
            return studio.fit(read_image(path))

    # gradio opens the file before it calls any function of the page, so that only here its errors can be caught.
    upload.preprocess = preprocess  # type: ignore[method-assign]
    upload.upload(fit, upload, upload, show_progress="hidden").failure(lambda: None, None, upload)
    return upload


def _canvas(studio: Studio, image: Image.Image) -> Image.Image:
    """Return an image as the model gets it, enlarged for painting."""
    image = studio.fit(image)
    factor = CANVAS / max(image.size)
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def _gallery(label: str, columns: int) -> gr.Gallery:
    """Return a gallery of results with buttons to download them; `label` is its id too."""
    return gr.Gallery(
        label=label,
        show_label=False,
        columns=columns,
        format="png",
        height="auto",
        interactive=False,
        buttons=["download", "download_all", "fullscreen"],
        elem_id=label,
        elem_classes="gallery",
    )


def _on_click(button: gr.Button, generate: Callable, inputs: set[Any], outputs: list[Any]) -> None:
    """Connect a button to a function that uses the model."""
    # One call at a time over all buttons and users, because the four pipelines share a scheduler.
    button.click(generate, inputs, outputs, concurrency_limit=1, concurrency_id="model", show_progress_on=outputs[:1])


def _steps(progress: gr.Progress) -> Callable[[int, int], None]:
    """Return a function that shows the steps of the model as progress."""

    def on_step(step: int, total: int) -> None:
        progress((step, total), desc="generating", unit="steps")

    return on_step


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Show errors as one line on the page."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        raise _message(first_line(error)) from error


def _message(text: str) -> gr.Error:
    """Return an error that the page shows and the log does not."""
    return gr.Error(text, print_exception=False)
