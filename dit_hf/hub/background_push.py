"""Pushing while a run goes on: nothing that goes wrong with the Hub, or on the way there, stops it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars
from safetensors import SafetensorError

from ..storage import new_folder
from .push import upload


class BackgroundPush:
    """Sends a run's repository in a thread; a push that fails is said, and the next one takes its place.

    Args:
        repo_id: The repository (`OWNER/NAME`).
        private: Whether a new one is private.
        revision: The branch; None is main.
        say: Is given one line for each push that succeeds or fails.
    """

    def __init__(self, repo_id: str, private: bool, revision: str | None, say: Callable[[str], None]):
        self.repo_id, self.private, self.revision, self.say = repo_id, private, revision, say
        self._thread: threading.Thread | None = None
        disable_progress_bars()  # the run has one of its own

    def begin(self, folder: Path, what: str, write: Callable[[Path], None]) -> None:
        """Have `write` fill `folder` now, and send it in the background; not while one is still on its way.

        Args:
            folder: Where it is kept until it has been sent.
            what: What to call it in the line that is said.
            write: Is given an empty folder.
        """
        if self._thread is not None and self._thread.is_alive():
            self.say(f"{what} is not pushed: the push before it is still on its way")
            return
        try:
            with new_folder(folder) as partial:
                write(partial)
        except (OSError, SafetensorError) as error:
            self._failed(what, error)
            return
        self._thread = threading.Thread(target=self._send, args=(folder, what), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is on its way any more."""
        if self._thread is not None:
            self._thread.join()

    def _send(self, folder: Path, what: str) -> None:
        try:
            self.say(f"{what} is now {upload(folder, self.repo_id, self.private, self.revision)}")
        except (OSError, ValueError) as error:
            self._failed(what, error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _failed(self, what: str, error: Exception) -> None:
        self.say(f"{what} was not pushed: {error}; the run goes on, and `dit-hf push` shares what it exports")
