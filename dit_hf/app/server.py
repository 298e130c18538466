"""Serve the page: which requests it answers, and which files it opens for them."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from gradio.utils import get_space, get_upload_folder
from PIL import Image
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..pipelines.image_inputs import IMAGE_FORMATS
from ..storage import first_line
from .results import message

MAX_FILE_BYTES = 50 * 2**20
MAX_PIXELS = 50_000_000
MAX_REQUEST_PIXELS = 3 * MAX_PIXELS  # an editor sends the image, what is painted on it, and both
MAX_WAITING = 4  # calls that wait for the model, beside the one under way
# An upload is one file and a few lines around it; other requests are far smaller.
_MAX_BODY_BYTES = MAX_FILE_BYTES + 2**20


def serve(page: gr.Blocks, host: str, port: int | None, **look: Any) -> str:
    """Start to serve `page` in the background and return its address.

    Args:
        page: The page.
        host: The address to listen at.
        port: The port; None is the first free one from 7860 on.
        look: Theme and styles as options of `gr.Blocks.launch`.

    Raises:
        OSError: if the port is taken.
    """
    _limit_images()
    # A short queue: whoever comes later is told so, instead of waiting for minutes.
    page.queue(max_size=MAX_WAITING)
    # Without blocking, so that the address can be printed as soon as there is one.
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=MAX_FILE_BYTES,
        app_kwargs={"middleware": [Middleware(LocalRequests, host=host)]},
        **look,
    )
    return url


def check_address(host: str, port: int | None) -> None:
    """Refuse an address of another machine, where gradio would try port after port, and a port that is taken.

    Raises:
        ValueError: if this machine cannot listen at `host`, or `port` is none.
        OSError: if the port is taken.
    """
    if port is not None and not 0 < port < 2**16:
        raise ValueError(f"port={port} must be between 1 and {2**16 - 1}")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        server.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as the server itself: one that just ended is gone
        try:
            server.bind((host.strip("[]"), port or 0))
        except OSError as error:
            reason = error.strerror or error
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                advice = "give another --port, or none for the first free one from 7860 on"
                raise OSError(f"port {port}: {str(reason).lower()}; {advice}") from None
            raise ValueError(f"host {host}: not an address of this machine ({reason})") from None


class LocalRequests:
    """ASGI middleware that refuses requests made in the name of another host, and bodies that are too large.

    A page of the internet can point its own host name to 127.0.0.1 (DNS rebinding), or send a form to a local port.
    The browser then names that page as `Host` or `Origin`.

    Args:
        app: The application.
        host: The address at which it listens. The names are checked only if that is this machine's own, and not on a
            Space, whose proxy has another name.
    """

    def __init__(self, app: ASGIApp, host: str):
        self.app = app
        is_local = _is_loopback(host) and get_space() is None
        self.names = {"localhost", "127.0.0.1", "::1", host.strip("[]").lower()} if is_local else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self.names is not None and not all(name in self.names for name in _named_hosts(headers)):
            await PlainTextResponse("this app answers only pages of its own machine", 403)(scope, receive, send)
            return
        if int(headers.get("content-length") or 0) > _MAX_BODY_BYTES:
            message = f"larger than {MAX_FILE_BYTES // 2**20} MB"
            await PlainTextResponse(message, 413)(scope, receive, send)
            return

        # A body may also come in chunks, without its length: the connection ends where there are too many.
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body") or b"")
            return message if received <= _MAX_BODY_BYTES else {"type": "http.disconnect"}

        await self.app(scope, limited, send)


class Page(gr.Blocks):
    """A page whose functions get no file but those that were uploaded to it or generated by it.

    gradio (6.31) checks this only for files that a request describes in full, and opens or downloads all others.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        files = [*_files(inputs)]
        for file in files:
            _check_uploaded(file)
        # A request may name one small file many times, each of which is decoded by itself.
        if sum(_pixels(Path(file["path"])) for file in files if file.get("path")) > MAX_REQUEST_PIXELS:
            raise message(f"images of more than {MAX_REQUEST_PIXELS:,} pixels together")
        try:
            return await super().preprocess_data(block_fn, inputs, *args, **kwargs)
        except gr.Error:  # our own messages, although they are ValueErrors
            raise
        except (OSError, TypeError, ValueError, KeyError, AttributeError) as error:
            # A truncated image, or a setting of another type; gradio puts lines of its own around the reason.
            reason = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise message(f"a request that cannot be read: {first_line(reason)}") from error


def _limit_images() -> None:
    """Let Pillow open only `IMAGE_FORMATS` and at most `MAX_PIXELS`, in this whole process.

    gradio opens what is uploaded by itself, in any format: for EPS Pillow would start Ghostscript.
    """
    Image.init()
    Image.ID[:] = [name for name in Image.ID if name in IMAGE_FORMATS]
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # an image of twice as many is an error, of more a warning


def _check_uploaded(file: dict[str, Any]) -> None:
    """Refuse a file of a request that is not a regular one of the upload folder.

    Args:
        file: As gradio's components describe a file.

    Raises:
        gr.Error: if it is another one, or larger than `MAX_FILE_BYTES`.
    """
    path, url = file.get("path"), file.get("url")
    if path is None and url is None:
        return
    # A URL beside the path is the address at which the browser shows the file.
    given = Path(str(path)).resolve()
    if path is None or not given.is_relative_to(Path(get_upload_folder()).resolve()) or not given.is_file():
        raise message("a file that was not uploaded to this app")
    if str(url or "").startswith("data:"):
        raise message("upload the image instead of sending it in the request")
    if given.stat().st_size > MAX_FILE_BYTES:
        raise message(f"larger than {MAX_FILE_BYTES // 2**20} MB")


def _pixels(path: Path) -> int:
    """Return the pixels of an uploaded image, 0 for a file that is none; nothing is decoded.

    Raises:
        gr.Error: for more than `MAX_PIXELS`.
    """
    try:
        with Image.open(path) as image:
            pixels = image.width * image.height
    except Image.DecompressionBombError:
        pixels = MAX_PIXELS + 1
    except (OSError, ValueError, SyntaxError):
        return 0
    if pixels > MAX_PIXELS:
        raise message(f"an image of more than {MAX_PIXELS:,} pixels; make it smaller")
    return pixels


def _files(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every dict of a request that names a file, however deep."""
    if isinstance(value, dict):
        if "path" in value or "url" in value:
            yield value
        for entry in value.values():
            yield from _files(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _files(entry)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _named_hosts(headers: Headers) -> Iterator[str]:
    """Yield the host names of a request's `Host` and, if it has one, `Origin`; "" for one that cannot be read."""
    addresses = [f"//{headers.get('host', '')}", *headers.getlist("origin")]
    for address in addresses:
        try:
            yield (urlsplit(address).hostname or "").lower()
        except ValueError:
            yield ""
