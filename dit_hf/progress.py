"""Progress of a long command: a bar in a terminal, and plain lines where the output goes to a file."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import datasets
import diffusers
import huggingface_hub
from tqdm import tqdm

INTERVAL = 60.0  # seconds between lines without a terminal


class ProgressBar:
    """Counts what is done, on stderr.

    Without a terminal a line is printed at most every `INTERVAL` seconds, and none that a later one overwrites.

    Args:
        total: How much there is to do.
        desc: What is done, e.g. `encoding`.
        unit: What is counted, in the plural.
        initial: How much of it was done before.
        shown: Whether anything is printed, on this rank.
    """

    def __init__(self, total: int, desc: str, unit: str, initial: int = 0, shown: bool = True):
        self.total, self.desc, self.unit, self.initial, self.shown = total, desc, unit, initial, shown
        self.done, self.began = initial, time.monotonic()
        self._last_line, self._printed = self.began, initial  # when the last line was printed, and its count
        self._bar = tqdm(total=total, desc=desc, unit=unit, initial=initial) if shown and _terminal() else None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.shown and self.done == self.total and self._printed < self.done:
            self._line("")

    def update(self, count: int = 1) -> None:
        """Count `count` more."""
        # A line is of the count before, which `report` has had time to print with its figures.
        late = time.monotonic() - self._last_line > INTERVAL
        if self._bar is None and self.shown and late and self._printed < self.done:
            self._line("")
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def report(self, text: str) -> None:
        """Show figures of the work: beside the bar, or on a line of its own."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif self.shown:
            self._line(text)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Let the bar say what is done in the block instead of what is counted."""
        if self._bar is not None:
            self._bar.set_description_str(what)
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.set_description_str(self.desc)

    def write(self, line: str) -> None:
        """Print a line that stays, above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self.shown:
            print(line, file=sys.stderr, flush=True)

    def remaining(self) -> float | None:
        """Return the seconds that are left at the speed so far, or None before anything is done."""
        done = self.done - self.initial
        return (time.monotonic() - self.began) / done * (self.total - self.done) if done else None

    def _line(self, text: str) -> None:
        self._last_line, self._printed = time.monotonic(), self.done
        left = self.remaining()
        parts = [f"{self.desc}: {self.done:,} of {self.total:,} {self.unit}", text]
        if self.done < self.total and left is not None:
            parts.append(f"{timedelta(seconds=round(left))} left")
        print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Turn off the bars of diffusers, datasets and huggingface_hub where there is no terminal to draw them in."""
    if not _terminal():
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
        diffusers.utils.logging.disable_progress_bar()


def _terminal() -> bool:
    """Check whether stderr is a terminal with a width: tqdm draws nothing in one of no columns."""
    with contextlib.suppress(OSError):  # it has no file descriptor
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    return sys.stderr.isatty()


@contextlib.contextmanager
def hidden_progress_bars() -> Iterator[None]:
    """Disable datasets' progress bars and restore their setting afterwards."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
