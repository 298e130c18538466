"""The tabs, one a mode: what each of them takes besides the panel's settings, and its call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from PIL import Image

from ..pipelines.attributes import Attributes
from .panel import Data, Panel
from .results import message, readable
from .studio import Call, Settings, Studio, read_image, union

# The side of an image to be inpainted on the page, in pixels; a small image has too few pixels for a brush.
CANVAS = 400
BRUSH = "#e0457b"
NO_IMAGE = "there is no image: upload a PNG or JPEG, or choose one of the results"


@dataclass
class Tab:
    """A tab.

    Args:
        mode: Its id; see [`Call`].
        call: Returns the call for the values of `inputs` and the panel, and the image before it, if there is one.
        button: Runs the call.
        stop: Stops it.
        inputs: Components beside those of the panel.
        image: The component that takes an image of the results, if there is one.
        prepare: Returns an image as `image` takes it.
    """

    mode: str
    call: Callable[[Data, Panel], tuple[Call, Image.Image | None]]
    button: gr.Button
    stop: gr.Button
    inputs: set[Any] = field(default_factory=set)
    image: gr.Image | gr.ImageEditor | None = None
    prepare: Callable[[Image.Image], Image.Image] = lambda image: image


def generate_tab(studio: Studio) -> Tab:
    """Build the tab of new images."""

    def call(data: Data, panel: Panel) -> tuple[Call, None]:
        return studio.generate(panel.requested(data), panel.settings(data)), None

    return Tab("generate", call, *_buttons("Generate", "generate"))


def edit_tab(studio: Studio) -> Tab:
    """Build the tab of attribute edits."""
    gr.Markdown("Changes the attributes that are set below, and keeps the rest of the image.")
    options = {"minimum": 0.1, "maximum": 3, "value": 1, "step": 0.1, "info": "1 is as much as the guidance"}
    return _image_tab(studio, "edit", "Edit", studio.edit, label="Amount", **options)


def vary_tab(studio: Studio) -> Tab:
    """Build the tab of image to image."""
    gr.Markdown("Generates variations of an image, with the attributes that are set below.")
    options = {"minimum": 0.05, "maximum": 1, "value": 0.6, "step": 0.05, "info": "1 keeps nothing of the image"}
    return _image_tab(studio, "img2img", "Vary", studio.vary, label="Strength", **options)


def inpaint_tab(studio: Studio) -> Tab:
    """Build the tab of inpainting."""
    gr.Markdown("Paint over the part of an image that is to be inpainted; the rest stays.")
    editor = gr.ImageEditor(
        type="pil",
        image_mode="RGBA",
        sources=["upload", "clipboard"],
        label="Image to inpaint",
        show_label=False,
        elem_id="editor",
        brush=gr.Brush(default_size=40, colors=[BRUSH], color_mode="fixed"),
        layers=False,
        transforms=[],
        canvas_size=(CANVAS, CANVAS),
        height=CANVAS + 60,
    )

    def enlarge(image: Image.Image) -> Image.Image:
        return _canvas(studio, image)

    def uploaded(value: dict[str, Any]) -> Image.Image:
        with readable():
            return enlarge(value["background"])

    def call(data: Data, panel: Panel) -> tuple[Call, None]:
        value = data[editor] or {}
        image = value.get("background")
        if image is None:
            raise ValueError(NO_IMAGE)
        mask = union(value["layers"], image.size)
        return studio.inpaint(image.convert("RGB"), mask, panel.requested(data), panel.settings(data)), None

    editor.upload(uploaded, editor, editor, show_progress="hidden")
    return Tab("inpaint", call, *_buttons("Inpaint", "inpaint"), {editor}, editor, enlarge)


def interpolate_tab(studio: Studio) -> Tab:
    """Build the tab of films."""
    gr.Markdown("Generates a film from the first image of a seed to its second one.")
    frames = gr.Slider(2, 32, 12, step=1, label="Frames")

    def call(data: Data, panel: Panel) -> tuple[Call, None]:
        return studio.interpolate(panel.requested(data), int(data[frames]), panel.settings(data)), None

    return Tab("interpolate", call, *_buttons("Interpolate", "interpolate"), {frames})


# The name of each mode's tab, and what builds it, in their order.
TABS: dict[str, tuple[str, Callable[[Studio], Tab]]] = {
    "generate": ("Generate", generate_tab),
    "edit": ("Edit", edit_tab),
    "img2img": ("Image to image", vary_tab),
    "inpaint": ("Inpaint", inpaint_tab),
    "interpolate": ("Interpolate", interpolate_tab),
}


def _image_tab(
    studio: Studio,
    mode: str,
    name: str,
    method: Callable[[Image.Image, Attributes, float, Settings], Call],
    **slider: Any,
) -> Tab:
    """Return the tab of a mode that takes an upload and a number, whose slider has these options."""
    upload = _upload(studio, f"Image to {name.lower()}")
    amount = gr.Slider(**slider)

    def call(data: Data, panel: Panel) -> tuple[Call, Image.Image]:
        image = _given(data[upload])
        return method(image, panel.requested(data), data[amount], panel.settings(data)), studio.fit(image)

    return Tab(mode, call, *_buttons(name, mode), {upload, amount}, upload, studio.fit)


def _buttons(name: str, mode: str) -> tuple[gr.Button, gr.Button]:
    """Return the button that runs a call, and the one that stops it."""
    with gr.Row():
        run = gr.Button(name, variant="primary", elem_id=f"run-{mode}", min_width=120, scale=3)
        stop = gr.Button("Stop", elem_id=f"stop-{mode}", min_width=80, scale=1)
    return run, stop


def _canvas(studio: Studio, image: Image.Image) -> Image.Image:
    """Return an image as the model gets it, enlarged for painting."""
    image = studio.fit(image)
    factor = CANVAS / max(image.size)
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def _given(path: str | None) -> Image.Image:
    """Return the image of an upload.

    Raises:
        ValueError: if there is none.
    """
    if path is None:
        raise ValueError(NO_IMAGE)
    return read_image(path)


def _upload(studio: Studio, label: str) -> gr.Image:
    """Return an upload that shows an image as the model gets it, and refuses broken files with a message."""
    upload = gr.Image(
        type="filepath",
        image_mode=None,
        format="png",
        sources=["upload", "clipboard"],
        label=label,
        height=240,
        elem_classes="upload",
    )
    original = upload.preprocess

    def preprocess(payload: Any) -> Any:
        try:
            return original(payload)
        except Exception as error:  # broken bytes make decoders raise anything
            name = getattr(payload, "orig_name", None) or "this file"
            raise message(f"{name} cannot be opened as an image; take a PNG or JPEG") from error

    def fit(path: str) -> Image.Image:
        with readable():
            return studio.fit(read_image(path))

    # gradio opens the file before it calls any function of the page, so that only here its errors can be caught.
    upload.preprocess = preprocess  # type: ignore[method-assign]
    upload.upload(fit, upload, upload, show_progress="hidden").failure(lambda: None, None, upload)
    return upload
