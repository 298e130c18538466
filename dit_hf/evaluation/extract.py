"""Feature extraction batch by batch, on any number of ranks; a call resumes from the batches of a killed one."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..devices import on_first_rank
from ..progress import ProgressBar
from ..sampling.generate import batches
from ..storage import hash_json, locked_beside, new_file, write_text
from .features import FeatureNet

IDENTITY = "identity.json"


@dataclass(frozen=True)
class Collected:
    """Features of images.

    Attributes:
        features: float32 [count, dim].
        rows: Rows that the features belong to, int64 [count].
        pixels_sha256: Hash over the batches' hashes of the pixels.
    """

    features: np.ndarray
    rows: np.ndarray
    pixels_sha256: str


def ranks() -> PartialState:
    """Return this process's place among the ranks, on the accelerator if there is one.

    The timeout is a week, because one rank may have much more work left than the others.
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


@contextlib.contextmanager
def locked_for_ranks(folder: Path) -> Iterator[None]:
    """Lock other calls out of `folder`, by the first rank; call it on all ranks.

    Raises:
        FileExistsError: on all ranks, if another call holds the lock.
    """
    ranks()  # with their timeout, before anything else asks for them
    with contextlib.ExitStack() as held:
        on_first_rank(lambda: held.enter_context(locked_beside(folder)))
        yield


@dataclass(frozen=True)
class Extraction:
    """The features of some images, extracted batch by batch and kept, so that a killed call is resumed.

    Attributes:
        folder: Keeps one file for each finished batch, in a subfolder named by the hash of the identity.
        net: The feature network.
        read: Reads rows as images, uint8 [n, height, width, 3], and returns the rows read beside them, as some images
            may be broken.
        rows: All rows.
        batch_size: Images at once. Batch k has the same images on any number of ranks.
        identity: Everything that decides the features, apart from network, batch size and number of images.
        title: Title of the progress bar.
    """

    folder: Path
    net: FeatureNet
    read: Callable[[Sequence[int]], tuple[np.ndarray, np.ndarray]]
    rows: Sequence[int]
    batch_size: int
    identity: dict[str, Any]
    title: str

    def missing(self) -> int:
        """Return the number of images whose features no earlier call has extracted."""
        return sum(map(len, self._unfinished(batches(len(self.rows), self.batch_size))))

    def extract(self) -> None:
        """Extract what is missing; must be called on all ranks, which share the batches."""
        state, folder = ranks(), self._batch_folder
        if state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / IDENTITY, json.dumps(self._whole_identity(), indent=2) + "\n")
        # The folder must exist before another rank writes to it.
        state.wait_for_everyone()

        # Extract this rank's unfinished batches.
        own_batches = batches(len(self.rows), self.batch_size, state.process_index, state.num_processes)
        missing = self._unfinished(own_batches)
        total = sum(map(len, own_batches))
        done = total - sum(map(len, missing))
        shown = state.is_main_process and bool(missing)
        with ProgressBar(total, self.title, "images", initial=done, shown=shown) as bar:
            for batch in missing:
                images, rows_read = self.read([int(self.rows[index]) for index in batch])
                features = self.net(images) if len(rows_read) else np.empty((0, self.net.dim), np.float32)
                pixels_sha256 = hashlib.sha256(images.tobytes()).hexdigest()
                _save_batch(self._file(batch), features, np.asarray(rows_read), pixels_sha256)
                bar.update(len(batch))

        # Whoever joins them reads the batches of all ranks.
        state.wait_for_everyone()

    def join(self) -> Collected:
        """Return all features, once they are extracted; one rank is enough.

        Raises:
            ValueError: if a file was damaged or deleted meanwhile.
        """
        return _join_batches([self._file(batch) for batch in batches(len(self.rows), self.batch_size)])

    def _unfinished(self, all_batches: Sequence[range]) -> list[range]:
        return [batch for batch in all_batches if _read_batch(self._file(batch)) is None]

    def _whole_identity(self) -> dict[str, Any]:
        size = {"batch_size": self.batch_size, "count": len(self.rows)}
        return {**self.identity, "features": self.net.identity(), **size}

    @functools.cached_property
    def _batch_folder(self) -> Path:
        # Named by the whole identity, so that other options never reuse these batches.
        return self.folder / hash_json(self._whole_identity())[:12]

    def _file(self, batch: range) -> Path:
        return self._batch_folder / f"from-{batch.start:08d}.safetensors"


def _save_batch(path: Path, features: np.ndarray, rows: np.ndarray, pixels_sha256: str) -> None:
    rows = rows.astype(np.int64)
    # A tensor and not metadata: safetensors writes several keys of that in any order.
    digest = np.frombuffer(bytes.fromhex(_batch_sha256(features, rows, pixels_sha256)), np.uint8)
    with new_file(path) as partial:
        save_file({"features": features, "rows": rows, "sha256": digest}, partial, {"pixels_sha256": pixels_sha256})


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray, str] | None:
    """Return the features, rows and hash of the pixels of a batch; None if it is missing or damaged."""
    try:
        with safe_open(path, "numpy") as opened:
            pixels_sha256 = opened.metadata()["pixels_sha256"]
            batch = opened.get_tensor("features"), opened.get_tensor("rows"), pixels_sha256
            names = set(opened.keys())  # batches of version 0.1.0 have no hash
            intact = "sha256" not in names or opened.get_tensor("sha256").tobytes().hex() == _batch_sha256(*batch)
    except (OSError, SafetensorError, KeyError, TypeError):
        return None
    return batch if intact else None


def _batch_sha256(features: np.ndarray, rows: np.ndarray, pixels_sha256: str) -> str:
    return hashlib.sha256(features.tobytes() + rows.tobytes() + pixels_sha256.encode()).hexdigest()


def _join_batches(files: list[Path]) -> Collected:
    features, rows, pixels = [], [], hashlib.sha256()
    for file in files:
        batch = _read_batch(file)
        if batch is None:  # its rank has just read or written it
            raise ValueError(f"{file} was damaged or deleted while it was in use; evaluate again")
        features.append(batch[0])
        rows.append(batch[1])
        pixels.update(batch[2].encode())
    return Collected(np.concatenate(features), np.concatenate(rows), pixels.hexdigest())
