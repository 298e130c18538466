"""The app: a page that generates, edits, varies, inpaints and interpolates images with a model."""

from __future__ import annotations

from pathlib import Path

from ..runs import load_pipeline
from ..versions import check_versions
from .studio import Studio


def app(model: str, host: str = "127.0.0.1", port: int | None = None) -> None:
    """Serve a page that generates images with a model, and edits and inpaints given ones, until Ctrl-C.

    Args:
        model: The folder of a run, of one of its checkpoints or of a pipeline, or a Hub id (`OWNER/NAME@REVISION`).
        host: The address to listen at; 0.0.0.0 is reachable from other machines.
        port: The port; by default the first free one from 7860 on.

    Raises:
        ValueError: if the model cannot be loaded, gradio is not installed, or this machine cannot listen at `host`.
        ImportError: if gradio is too old.
        OSError: if the port is taken.
    """
    check_versions("app")
    # gradio is an optional dependency, and takes seconds to import.
    try:
        from .about import about
        from .page import build_page, look
        from .server import check_address, serve
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; the app needs it: pip install gradio") from error

    check_address(host, port)

    # The page's title is a folder's name, without the path, or the Hub id.
    name = Path(model).absolute().name if Path(model).is_dir() else model
    studio = Studio(load_pipeline(model))
    page = build_page(studio, model, f"dit_hf: {name}", about(model, name, studio))

    url = serve(page, host, port, **look())
    print(f"{model} at {url} (stop with Ctrl-C)", flush=True)
    page.block_thread()
    studio.close()
