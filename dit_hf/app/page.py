"""The app's page: the model's attributes on the left; new images, changed ones and painted ones on the right."""

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
from .studio import Control, Settings, Studio, read_image, union

NUM_IMAGES, MAX_IMAGES = 8, 16
# Images are shown to be painted on at this size at least; the pixels of a small one are too few for a brush.
CANVAS = 512
GENERATE, CHANGE, INPAINT = "generate", "change", "inpaint"
VARY, EDIT = "Draw again", "Change attributes"
ACCENT = "#e0457b"

# All fonts are the machine's own, so that the page needs no network.
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
    """The controls on the left, which serve every tab."""

    studio: Studio
    attributes: dict[str, gr.Radio | gr.Dropdown]
    num_images: gr.Slider
    seed: gr.Number
    new_seed: gr.Checkbox
    steps: gr.Slider
    guidance: gr.Slider

    @property
    def inputs(self) -> set[Any]:
        """What an event that draws needs of the panel."""
        return {*self.attributes.values(), self.num_images, self.seed, self.new_seed, self.steps, self.guidance}

    def asked(self, data: Data) -> dict[str, AttributeValue]:
        """The attributes that are not left open."""
        chosen = [(control, data[self.attributes[control.name]]) for control in self.studio.controls]
        return {control.name: control.values[number][1] for control, number in chosen if number}

    def settings(self, data: Data) -> Settings:
        """How to sample; the seed is a new one where that is wished for."""
        seed = data[self.seed]
        if seed is None or data[self.new_seed]:
            seed = random.randrange(2**31)
        return Settings(int(data[self.num_images]), int(seed), int(data[self.steps]), float(data[self.guidance]))


def build_page(studio: Studio, name: str) -> gr.Blocks:
    """The page of a model called `name`."""
    with gr.Blocks(title=f"dit_hf: {name}", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# {name}\nPictures from a latent Diffusion Transformer", elem_classes="title")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                panel = _panel(studio)
            with gr.Column(scale=5, min_width=420), gr.Tabs(selected=GENERATE) as tabs:
                with gr.Tab("New images", id=GENERATE):
                    to_change, to_inpaint, drawn, selected = _generate_tab(panel)
                with gr.Tab("Change an image", id=CHANGE):
                    upload = _change_tab(panel)
                with gr.Tab("Paint anew", id=INPAINT):
                    editor = _inpaint_tab(panel)

        def chosen(gallery: list[tuple[str, str]] | None, index: int) -> Image.Image:
            with _readable():
                if not gallery:
                    raise ValueError("draw some images first, then choose one")
                return read_image(gallery[min(index, len(gallery) - 1)][0])

        def change(gallery: list[tuple[str, str]] | None, index: int) -> tuple[gr.Tabs, Image.Image]:
            return gr.Tabs(selected=CHANGE), chosen(gallery, index)

        def inpaint(gallery: list[tuple[str, str]] | None, index: int) -> tuple[gr.Tabs, Image.Image]:
            return gr.Tabs(selected=INPAINT), _canvas(studio, chosen(gallery, index))

        to_change.click(change, [drawn, selected], [tabs, upload])
        to_inpaint.click(inpaint, [drawn, selected], [tabs, editor])
    return page


def look() -> dict[str, Any]:
    """Theme and styles, as options of `gr.Blocks.launch`."""
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
    with gr.Accordion("Sampling"):
        num_images = gr.Slider(1, MAX_IMAGES, NUM_IMAGES, step=1, label="Pictures")
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=110)
            new_seed = gr.Checkbox(True, label="New each time", min_width=110)
        steps = gr.Slider(1, min(100, studio.num_levels), min(25, studio.num_levels), step=1, label="Steps")
        highest = max(8.0, 2 * studio.guidance_scale)
        guidance = gr.Slider(
            *(1.0, highest, studio.guidance_scale), step=0.1, label="Guidance", visible=bool(studio.controls)
        )
    panel = Panel(studio, attributes, num_images, seed, new_seed, steps, guidance)
    if attributes:

        def summarize(data: Data) -> str:
            asked = panel.asked(data)
            return _summary(
                [_words(control, asked[control.name]) for control in studio.controls if control.name in asked]
            )

        choices = list(attributes.values())
        gr.on(
            [choice.change for choice in choices], summarize, {*choices}, summary, queue=False, show_progress="hidden"
        )
        clear.click(lambda: [0] * len(choices), None, choices, queue=False, show_progress="hidden")
    return panel


def _choice(control: Control) -> gr.Radio | gr.Dropdown:
    words = [(word, number) for number, (word, _) in enumerate(control.values)]
    kind = gr.Radio if len(words) <= 3 else gr.Dropdown
    return kind(words, value=0, label=control.label, elem_classes="choice")


def _words(control: Control, value: AttributeValue) -> str:
    if isinstance(value, bool):
        return control.label if value else f"not {control.label}"
    return f"{control.label}: {next(word for word, known in control.values if known == value)}"


def _summary(words: list[str]) -> str:
    return f"**Asked for:** {', '.join(words) or 'anything'}"


def _generate_tab(panel: Panel) -> tuple[gr.Button, gr.Button, gr.Gallery, gr.State]:
    button = gr.Button("Draw", variant="primary", elem_id="draw")
    gallery = _gallery("drawn", columns=4)
    with gr.Row():
        to_change = gr.Button("Change the chosen one", size="sm")
        to_inpaint = gr.Button("Paint on the chosen one", size="sm")
    selected = gr.State(0)

    def draw(data: Data, progress: gr.Progress = gr.Progress()) -> tuple[list[Image.Image], int, int]:  # noqa: B008
        with _readable():
            settings = panel.settings(data)
            return panel.studio.generate(panel.asked(data), settings, _steps(progress)), settings.seed, 0

    def select(event: gr.SelectData) -> int:
        return event.index

    _on_click(button, draw, panel.inputs, [gallery, panel.seed, selected])
    gallery.select(select, None, selected, queue=False, show_progress="hidden")
    return to_change, to_inpaint, gallery, selected


def _change_tab(panel: Panel) -> gr.Image:
    studio = panel.studio
    gr.Markdown("An image drawn again out of noise, or with the attributes on the left changed.", elem_classes="hint")
    with gr.Row():
        with gr.Column(scale=2):
            upload = _upload(studio)
            how = gr.Radio(
                [VARY, EDIT],
                value=VARY,
                show_label=False,
                container=False,
                elem_id="how",
                visible=bool(studio.controls),
            )
            strength = gr.Slider(0.05, 1, 0.6, step=0.05, label="Strength", info="1 keeps nothing of the image")
            amount = gr.Slider(
                *(0.1, 3, 1), step=0.1, label="Amount", info="of what is asked for on the left", visible=False
            )
            button = gr.Button("Change", variant="primary", elem_id="change")
        with gr.Column(scale=3):
            gallery = _gallery("changed", columns=3)

    def switch(how: str) -> tuple[gr.Slider, gr.Slider]:
        return gr.Slider(visible=how == VARY), gr.Slider(visible=how == EDIT)

    def change(data: Data, progress: gr.Progress = gr.Progress()) -> tuple[list[tuple[Image.Image, str]], int]:  # noqa: B008
        with _readable():
            if data[upload] is None:
                raise ValueError("upload an image first, or draw one and choose it")
            image = read_image(data[upload])
            settings, asked, on_step = panel.settings(data), panel.asked(data), _steps(progress)
            if data[how] == EDIT:
                progress(0, desc="finding the noise that gives this image")
                images = studio.edit(image, asked, data[amount], settings, on_step)
            else:
                images = studio.vary(image, asked, data[strength], settings, on_step)
            return [(studio.fit(image), "before"), *((one, "after") for one in images)], settings.seed

    how.change(switch, how, [strength, amount], queue=False, show_progress="hidden")
    _on_click(button, change, {*panel.inputs, upload, how, strength, amount}, [gallery, panel.seed])
    return upload


def _inpaint_tab(panel: Panel) -> gr.ImageEditor:
    studio = panel.studio
    gr.Markdown("Paint over the part of an image that is to be drawn anew; the rest stays.", elem_classes="hint")
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
            button = gr.Button("Paint anew", variant="primary", elem_id="inpaint")
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
                raise ValueError("there is no image to paint on: upload a PNG or JPEG, or draw one and choose it")
            settings, mask = panel.settings(data), union(value["layers"], image.size)
            asked, image = panel.asked(data), image.convert("RGB")
            return studio.inpaint(image, mask, asked, settings, _steps(progress)), settings.seed

    editor.upload(upload, editor, editor, show_progress="hidden")
    _on_click(button, inpaint, {*panel.inputs, editor}, [gallery, panel.seed])
    return editor


def _upload(studio: Studio) -> gr.Image:
    """Where an image is uploaded; shown as the model sees it."""
    upload = gr.Image(
        type="filepath",
        image_mode=None,
        format="png",
        sources=["upload", "clipboard"],
        label="An image",
        height=320,
        elem_id="upload",
    )
    opened = upload.preprocess

    def preprocess(payload: Any) -> Any:
        try:
            return opened(payload)
        except Exception as error:  # broken bytes make decoders raise anything
            name = getattr(payload, "orig_name", None) or "this file"
            raise _message(f"{name} is no image that can be opened; take a PNG or JPEG") from error

    def fit(path: str) -> Image.Image:
        with _readable():
            return studio.fit(read_image(path))

    upload.preprocess = preprocess  # type: ignore[method-assign]  # it is called before any of the page's own code is
    upload.upload(fit, upload, upload, show_progress="hidden").failure(lambda: None, None, upload)
    return upload


def _canvas(studio: Studio, image: Image.Image) -> Image.Image:
    """What the model sees of an image, large enough to be painted on."""
    image = studio.fit(image)
    factor = CANVAS / max(image.size)
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def _gallery(label: str, columns: int) -> gr.Gallery:
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


def _on_click(button: gr.Button, draw: Callable, inputs: set[Any], outputs: list[Any]) -> None:
    """One image at a time: the four pipelines share a scheduler."""
    button.click(draw, inputs, outputs, concurrency_limit=1, concurrency_id="model", show_progress_on=outputs[:1])


def _steps(progress: gr.Progress) -> Callable[[int, int], None]:
    def on_step(step: int, total: int) -> None:
        progress((step, total), desc="drawing", unit="steps")

    return on_step


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Errors as one line on the page."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        raise _message(first_line(error)) from error


def _message(text: str) -> gr.Error:
    return gr.Error(text, print_exception=False)
