"""The app: a page that draws images with a model, changes given ones, and paints parts of them anew."""

from __future__ import annotations

from pathlib import Path

from ..runs import load_pipeline
from .studio import Studio


def app(model: str, host: str = "127.0.0.1", port: int | None = None) -> None:
    """Serve a page that draws images with `model`, changes given ones, and paints parts of them anew, until Ctrl-C.

    Args:
        model: The folder of a run, of one of its checkpoints or of a pipeline, or a Hub id.
        host: The address to listen at; 0.0.0.0 lets other machines in.
        port: The port; None is the first free one from 7860 on.

    Raises:
        ValueError: if the model cannot be loaded, or gradio is not installed.
        OSError: if the port is taken.
    """
    try:
        from .page import build_page, look
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; the app needs it: pip install gradio") from error
    name = Path(model).absolute().name if Path(model).is_dir() else model
    page = build_page(Studio(load_pipeline(model)), name)
    _, url, _ = page.launch(
        server_name=host, server_port=port, share=False, ssr_mode=False, quiet=True, prevent_thread_lock=True, **look()
    )
    print(f"{model} at {url} (Ctrl-C ends it)", flush=True)
    page.block_thread()
