"""Checkpoints that are written while training continues."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..devices import FREE_SHARE, free_memory, on_first_rank
from ..storage import first_line
from .checkpoint import TrainingTensors, save_checkpoint


class BackgroundSave:
    """Writes checkpoints in a thread of the first rank, one at a time; the next one waits for it.

    As a context manager it does not end before the checkpoint under way is written.

    Args:
        tensors: What a checkpoint holds.
        device: The device of the training.
        limits: Numbers of checkpoints to keep, the newest and the best; see `save_checkpoint`.
        print_line: Prints a line on the first rank.
    """

    def __init__(
        self,
        tensors: TrainingTensors,
        device: torch.device,
        limits: tuple[int, int],
        print_line: Callable[[str], None],
    ):
        self._tensors, self._device, self._limits, self._print = tensors, device, limits, print_line
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[None] | None = None

    def save(
        self, run: Path, state: dict[str, Any], log: Path, then: Callable[[], None], at_once: bool = False
    ) -> None:
        """Begin to write a checkpoint; call it on all ranks.

        Args:
            run: The run's folder.
            state: See `save_checkpoint`.
            log: The log, which is copied into the checkpoint as it is now.
            then: Called in the thread once the checkpoint stands.
            at_once: Return only when it stands.

        Raises:
            OSError: if the checkpoint before could not be written, or, `at_once`, this one.
        """
        # The one before must stand first: its error counts, and it holds as much memory.
        on_first_rank(self.wait)
        # All ranks gather, the first one writes.
        contents = self._tensors.gather()

        def begin() -> None:
            log_bytes = log.read_bytes() if log.is_file() else None  # somebody may have deleted it
            own_contents = self._copied(contents)

            def write() -> None:
                save_checkpoint(run, state, own_contents or contents, *self._limits, log_bytes)
                then()

            self._under_way = self._thread.submit(write)
            if at_once or own_contents is None:
                self.wait()

        on_first_rank(begin)

    def wait(self) -> None:
        """Wait until the checkpoint under way, if there is one, is written.

        Raises:
            OSError: if it could not be; earlier checkpoints are good.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def check(self) -> None:
        """Raise the error of the checkpoint under way, if it has failed already."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def __enter__(self) -> BackgroundSave:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is None:
            self.wait()
        elif self._under_way is not None and isinstance(error := self._under_way.exception(), Exception):
            self._print(f"the checkpoint under way was not written ({first_line(error)}); earlier ones are good")
        self._thread.shutdown()

    def _copied(self, contents: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]] | None:
        """Return contents that training does not change; None if the memory does not suffice, which is printed."""
        if self._device.type != "cpu":  # where they have been copied from the device
            return contents
        needed, (_, free) = self._tensors.bytes(), free_memory(self._device)
        if free is not None and needed > FREE_SHARE * free:
            self._print(
                f"training waits for this checkpoint: a copy of {needed / 1e9:.1f} GB does not fit into "
                f"{free / 1e9:.1f} GB of free memory"
            )
            return None
        return {
            name: {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in content.items()}
            for name, content in contents.items()
        }
