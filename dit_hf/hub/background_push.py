"""Pushes in the background of a run: no failure of the Hub or of the connection stops the training."""

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
    """Pusher of a run's repository in a thread; a failed push is logged, and the next push replaces it.

    Args:
        repo_id: The repository, `OWNER/NAME`.
        private: Whether a new repository is private.
        revision: The branch; None is main.
        log: Called with one line for each push that succeeds or fails.
    """

    def __init__(self, repo_id: str, private: bool, revision: str | None, log: Callable[[str], None]):
        self.repo_id, self.private, self.revision, self.log = repo_id, private, revision, log
        self._thread: threading.Thread | None = None
        disable_progress_bars()  # the Hub's bars would break the training's own

    def begin(self, folder: Path, title: str, write: Callable[[Path], None]) -> None:
        """Write the repository now and upload it in the background, unless the previous push is still running.

        Args:
            folder: Holds the repository until it has been uploaded.
            title: Name of the push in the log.
            write: Fills an empty folder with the repository.
        """
        if self._thread is not None and self._thread.is_alive():
            self.log(f"{title} is not pushed: the previous push is still running")
            return
        # Written before the thread starts: the next training step changes the weights.
        try:
            with new_folder(folder) as partial:
                write(partial)
        except (OSError, SafetensorError) as error:
            self._log_failure(title, error)
            return
        self._thread = threading.Thread(target=self._upload, args=(folder, title), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the running push to end."""
        if self._thread is not None:
            self._thread.join()

    def _upload(self, folder: Path, title: str) -> None:
        try:
            self.log(f"{title} is now {upload(folder, self.repo_id, self.private, self.revision)}")
        except (OSError, ValueError) as error:
            self._log_failure(title, error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _log_failure(self, title: str, error: Exception) -> None:
        self.log(f"{title} was not pushed: {error}; training continues, and `dit-hf push` shares the exported model")
