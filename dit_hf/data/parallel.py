"""Work on all rows of a dataset in threads, with few of its images in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from datasets import Dataset

from ..devices import available_cpus
from ..progress import ProgressBar
from .stored_images import with_bytes

CHUNK = 64  # rows that are read at once, and between two updates of the progress bar
Result = TypeVar("Result")


def map_rows(
    work: Callable[[dict[str, Any]], Result], rows: Dataset, desc: str, unit: str, shown: bool = True
) -> Iterator[Result]:
    """Yield what `work` returns for each row, in their order.

    Args:
        work: Called in threads.
        rows: The rows, with no more columns than `work` needs; images inside shards come with their bytes.
        desc: What is done, for the progress bar.
        unit: What is counted.
        shown: Whether there is a progress bar.
    """
    with ThreadPoolExecutor(available_cpus()) as pool, ProgressBar(len(rows), desc, unit, shown=shown) as progress:
        for start in range(0, len(rows), CHUNK):
            # A pool's own `map` would read all rows before it returns the first result.
            chunk = [_with_bytes(rows[row]) for row in range(start, min(start + CHUNK, len(rows)))]
            yield from pool.map(work, chunk)
            progress.update(len(chunk))


def _with_bytes(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "image": with_bytes(row["image"])} if "image" in row else row
