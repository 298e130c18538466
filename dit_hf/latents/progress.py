"""Follow an encoding: its speed, and the images that are left out."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from ..data.anonymous import COPY
from ..data.faces import NO_FACE, TOO_SMALL
from ..data.near_duplicates import NEAR_DUPLICATE
from ..devices import peak_memory
from ..progress import ProgressBar
from .cache import CacheSpec
from .shards import Job


def check_share(share: float) -> None:
    """Refuse a share of images to leave out that is none.

    Raises:
        ValueError: naming the option.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"max_left_out={share:g}: expected a share from 0 to 1")


class LeftOut:
    """The images of a cache that are left out: a list that raises as soon as it exceeds `max_left_out`.

    Two shares are added up: the rows that the source itself leaves out, of the whole source even if `num_images` takes
    only a few, and the broken images, of `CacheSpec.num_images`. A photograph without a usable face, or a near
    duplicate of another, is not broken: it is listed, but not counted.
    """

    def __init__(self, spec: CacheSpec):
        self.share, self.source, self.num_images = spec.max_left_out, spec.source, spec.num_images
        self.broken: list[tuple[str, str]] = []
        self.num_source_faults, self.num_faults = _num_faults(self.source.left_out), 0
        self.add([])

    def all(self) -> list[tuple[str, str]]:
        """Return id and reason of every image that is left out."""
        return self.source.left_out + self.broken

    def add(self, broken: list[tuple[str, str]]) -> None:
        """Add ids and reasons of images that cannot be decoded.

        Raises:
            ValueError: with the first reasons, if the share is exceeded.
        """
        self.broken += broken
        self.num_faults += _num_faults(broken)
        counts = (self.num_source_faults, self.source.total), (self.num_faults, self.num_images)
        if sum(count / max(1, total) for count, total in counts) > self.share:
            summary = " and ".join(f"{count} of {total} images" for count, total in counts if count)
            faults = [(image_id, reason) for image_id, reason in self.all() if _is_fault(reason)]
            first = "; ".join(f"{image_id}: {reason}" for image_id, reason in faults[:3])
            raise ValueError(f"{summary} cannot be used, more than max_left_out={self.share:g} of them: {first}")


def _num_faults(left_out: list[tuple[str, str]]) -> int:
    """Return the number of images that are left out because something is wrong with them."""
    return sum(_is_fault(reason) for _, reason in left_out)


def _is_fault(reason: str) -> bool:
    return reason not in (NO_FACE, TOO_SMALL, NEAR_DUPLICATE, COPY)


class Progress:
    """Progress bar that prints once, after the first batches or shards, what the encoding will take.

    Args:
        job: The cache that is encoded.
        shards: The shards that this rank encodes.
        num_proc: Number of processes that encode them.
        shown: Whether anything is printed.
    """

    def __init__(self, job: Job, shards: list[int], num_proc: int, shown: bool):
        self.job = job
        # The calls of `update` between which the speed is measured. One process reports each batch, of which the first
        # warms up. Several report whole shards, the first of all processes at nearly the same time.
        self.measured = (1, 3) if num_proc == 1 else (0, num_proc)
        total = sum(len(job.rows_of(shard)) for shard in shards)
        self.bar = ProgressBar(total, "encoding", "images", shown=shown)
        self.calls = 0
        self.first = (0, time.monotonic())  # images and time when the measurement began

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)

    def update(self, count: int) -> None:
        """Count `count` images that were encoded."""
        self.bar.update(count)
        self.calls += 1
        begin, end = self.measured
        if self.calls == begin:
            self.first = (self.bar.done, time.monotonic())
        if self.calls == end and self.bar.done < self.bar.total:
            images, seconds = self.bar.done - self.first[0], time.monotonic() - self.first[1]
            self.bar.write(self.estimate(images / max(seconds, 1e-9)))

    def estimate(self, speed: float) -> str:
        """Return what is left to be encoded at `speed` images/s, and what it takes."""
        left = self.bar.total - self.bar.done
        return (
            f"{left:,} images left at {speed:,.1f} images/s: about {timedelta(seconds=round(left / speed))}, "
            f"{peak_memory()}, {left * self.job.bytes_per_row / 1e9:,.2f} GB on the disk"
        )
