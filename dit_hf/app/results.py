"""The results, which all tabs share: the gallery, the buttons that edit an image of it again, and the Python code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from ..image_grid import FILM
from ..sampling.writer import save_gif
from ..storage import first_line, temporary_folder
from .panel import Panel
from .snippet import python_code
from .studio import Call, Studio, Update, read_image

CHOOSE = "Choose an image to enlarge, download or edit it."


@dataclass
class Results:
    """The components of the results, and the model that generates them.

    Args:
        model: What the Python code loads.
        status: A line about them.
        gallery: The images.
        selected: The number of the selected image; None if none is.
        code: The Python code of the last call.
        buttons: By the mode whose tab they hand the selected image to.
    """

    studio: Studio
    model: str
    status: gr.Markdown
    gallery: gr.Gallery
    selected: gr.State
    code: gr.Code
    buttons: dict[str, gr.Button]

    def run(self, call: Call, panel: Panel, before: Image.Image | None = None) -> Iterator[dict[Any, Any]]:
        """Run a call and yield updates of the page; `before` is shown beside the results."""
        yield {panel.seed: call.settings.seed, self.code: python_code(call, self.model), self.selected: None}
        with contextlib.closing(self.studio.run(call)) as updates:
            for update in updates:
                if update.is_last:
                    yield from self._show(call, update.images, before)
                else:
                    yield self._progress(update)

    def _show(self, call: Call, images: list[Image.Image], before: Image.Image | None) -> Iterator[dict[Any, Any]]:
        """Yield the update of the page that shows the results, with the film that they are or the image before."""
        shown: list[Any] = [*images]
        with temporary_folder("app") as folder:
            if before is not None:
                shown = [(before, "before"), *((image, "after") for image in images)]
            if call.mode == "interpolate":
                save_gif(images, folder / FILM)
                shown = [(str(folder / FILM), "film"), *images]
            # gradio copies the film before this goes on.
            status = f"Seed {call.settings.seed}. {CHOOSE}"
            yield {self.gallery: gr.Gallery(shown, selected_index=None), self.status: status}

    def _progress(self, update: Update) -> dict[Any, Any]:
        """Return updates of the page during a call, with a preview if there is one."""
        status = f"Step {update.step} of {update.num_steps}" if update.num_steps else "Starting"
        return {self.status: status} | ({self.gallery: update.images} if update.images else {})


def build_results(studio: Studio, model: str) -> Results:
    """Build the gallery, the buttons and the code."""
    status = gr.Markdown(f"Examples. {CHOOSE}", elem_id="status")
    gallery = gr.Gallery(
        label="Results",
        show_label=False,
        format="png",
        height="auto",
        interactive=False,
        buttons=["download", "download_all", "fullscreen"],
        elem_id="results",
    )
    selected = gr.State(None)
    with gr.Row():
        buttons = {
            mode: gr.Button(f"{name} this image", size="sm", min_width=80)
            for mode, name in (("edit", "Edit"), ("img2img", "Vary"), ("inpaint", "Inpaint"))
        }
    with gr.Accordion("Copy as Python", open=False):
        code = gr.Code(language="python", show_label=False, interactive=False, container=False)

    def select(event: gr.SelectData) -> int:
        return event.index

    gallery.select(select, None, selected, queue=False, show_progress="hidden")
    gallery.preview_close(lambda: None, None, selected, queue=False, show_progress="hidden")
    return Results(studio, model, status, gallery, selected, code, buttons)


def selected_image(gallery: list[tuple[str, str]] | None, number: int | None) -> Image.Image:
    """Return the selected image of the gallery.

    Raises:
        ValueError: if there is none.
    """
    if not gallery or number is None:
        raise ValueError("choose an image of the results first")
    # A new series may be shorter than the one in which an image was selected.
    return read_image(gallery[min(int(number), len(gallery) - 1)][0])


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Show errors as one line on the page."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        raise message(first_line(error)) from error


def message(text: str) -> gr.Error:
    """Return an error that the page shows and the log does not."""
    return gr.Error(text, print_exception=False)
