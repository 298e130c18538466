"""Compare the images of a source with those that a cache was encoded from, by content.

A file or shard whose size, time of modification and inode are those that were recorded counts as unchanged, and so do
the images at their places in it; any other image is hashed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..data.stored_images import NO_STAMP, Stamp, image_stamp, read_image, with_bytes
from ..data.transforms import Geometry, decode_crops, photo_of
from ..devices import available_cpus
from ..progress import ProgressBar
from ..storage import new_file, read_arrays
from .shards import IMAGE_SHA256, Job, ShardNotes, open_shards

# Inside a finished cache, about the machine that made it: neither in the manifest nor uploaded.
SOURCE_FILES = "source_files.npz"
BATCH = 256


@dataclass
class Comparison:
    """Images of a source, compared with shards that were encoded earlier.

    Attributes:
        changed: Ids of images whose content is not what was encoded.
        readable: Shards that left out images which can be decoded now.
        stamps: Of each shard that was compared: int64 [rows, 3], as its files are now.
    """

    changed: list[str] = field(default_factory=list)
    readable: list[int] = field(default_factory=list)
    stamps: dict[int, np.ndarray] = field(default_factory=dict)


def compare_images(rows: Dataset, job: Job, folder: Path, shards: dict[int, np.ndarray | None]) -> Comparison:
    """Compare the images of a source with finished shards.

    Args:
        rows: All rows of the source, images not decoded; their ids are those of the cache.
        job: The job that encodes them.
        folder: The folder of the shards.
        shards: The shards, with the stamps that were recorded for their rows, int64 [rows, 3], or None.
    """
    result, images = Comparison(), rows.select_columns(["id", "image"])
    with ThreadPoolExecutor(available_cpus()) as pool:
        for shard, recorded in shards.items():
            part = images.select(job.rows_of(shard))
            stamps = np.zeros((len(part), 3), np.int64) if recorded is None else recorded.copy()
            hashes = list(_hashes(part["id"], folder / job.file_name(shard), job.geometry.crop))
            for start in range(0, len(part), BATCH):
                batch = part[start : start + BATCH]
                # Stamps first, in this thread: they take microseconds and decide for almost every file.
                rows_left = [
                    row
                    for row, stored in enumerate(batch["image"])
                    if hashes[start + row] is None or not _same_file(stored, stamps[start + row])
                ]
                ids = [batch["id"][row] for row in rows_left]
                images_left = (with_bytes(batch["image"][row]) for row in rows_left)
                expected = [hashes[start + row] for row in rows_left]
                checked = pool.map(_check, ids, images_left, expected, itertools.repeat(job.geometry))
                for row, image_id, sha256, stamp in zip(rows_left, ids, expected, checked, strict=True):
                    if stamp is not None:
                        stamps[start + row] = stamp
                    if sha256 is not None and stamp is None:
                        result.changed.append(image_id)
                    if sha256 is None and stamp is not None and shard not in result.readable:
                        result.readable.append(shard)
            result.stamps[shard] = stamps
    return result


def hash_images(
    rows: Dataset, likely: np.ndarray, sha256s: pa.ChunkedArray, stamps: np.ndarray
) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Hash the images of a source; a file of the stamp that a cache has recorded is not read.

    Args:
        rows: The rows of the source, images not decoded.
        likely: For each of them the row of the cache that it probably is, [rows], -1 if there is none.
        sha256s: Hashes of the cache's rows.
        stamps: Their stamps, int64 [rows of the cache, 3].

    Returns:
        The hash of each image, null if it cannot be read, and its stamp, int64 [rows, 3].
    """
    images, found = rows.select_columns("image"), np.zeros((len(rows), 3), np.int64)
    hashes: list[pa.Array] = []
    with ThreadPoolExecutor(available_cpus()) as pool, ProgressBar(len(rows), "comparing", "images") as progress:
        for start in range(0, len(rows), BATCH):
            batch = images[start : start + BATCH]["image"]
            numbers = likely[start : start + BATCH].tolist()
            same = [n >= 0 and _same_file(image, stamps[n]) for image, n in zip(batch, numbers, strict=True)]
            unknown = (with_bytes(image) for image, known in zip(batch, same, strict=True) if not known)
            read = pool.map(_hash_image, unknown)
            texts = []
            for row, (known, number) in enumerate(zip(same, numbers, strict=True), start):
                text, found[row] = (sha256s[number].as_py(), stamps[number]) if known else next(read)
                texts.append(text)
            hashes.append(pa.array(texts, pa.string()))
            progress.update(len(batch))
    return pa.chunked_array(hashes, pa.string()), found


def _hash_image(stored: dict[str, Any] | None) -> tuple[str | None, Stamp]:
    """Return the hash of an undecoded image, None if it cannot be read, and the stamp of its file."""
    try:
        data, stamp = read_image(stored)
    except OSError:
        return None, NO_STAMP
    return (None if data is None else hashlib.sha256(data).hexdigest()), stamp


def _hashes(ids: list[str], shard: Path, crop: str) -> Iterator[str | None]:
    """Yield the recorded hash of each image of a shard by its id, None for those that were left out."""
    table = open_shards([shard])
    # The shard has the images in the order of the source; the faces of a photograph share its hash.
    photos = [photo_of(image_id, crop) for image_id in table.column("id").to_pylist()]
    recorded = dict(zip(photos, table.column(IMAGE_SHA256).to_pylist(), strict=True))
    return map(recorded.get, ids)


def _same_file(stored: dict[str, Any] | None, stamp: np.ndarray) -> bool:
    """Check whether an image is in a file with this stamp, without reading it."""
    try:
        now = image_stamp(stored)
    except OSError:
        return False
    return now != NO_STAMP and now == tuple(stamp.tolist())


def _check(image_id: str, stored: dict[str, Any] | None, sha256: str | None, geometry: Geometry) -> Stamp | None:
    """Return the stamp of an image of this hash, or, without a hash, of one that can be decoded; otherwise None."""
    try:
        data, stamp = read_image(stored)
        row = {"id": image_id, "image": {**(stored or {}), "bytes": data}}
        if sha256 is None and not decode_crops(row, geometry).crops:
            return None
    except (OSError, ValueError):
        return None
    return stamp if sha256 is None or hashlib.sha256(data or b"").hexdigest() == sha256 else None


class SourceFiles(NamedTuple):
    """What a finished cache needs to be compared and added to, on the machine that made it.

    Attributes:
        stamps: Of each image that was to be encoded, left out or not, int64 [images, 3].
        notes: Those of the shards that it encoded.
        base: Stamps of the rows that it took over from the cache that it has grown from, int64 [rows, 3].
    """

    stamps: np.ndarray
    notes: list[ShardNotes]
    base: np.ndarray = np.zeros((0, 3), np.int64)

    def of_rows(self, photos: list[str]) -> np.ndarray:
        """Return the stamps of a cache's rows, int64 [rows, 3], those of no file where they are not known.

        Args:
            photos: Id of the photograph of each row; the rows of a photograph follow each other.
        """
        stamps = np.zeros((len(photos), 3), np.int64)
        stamps[: len(self.base)] = self.base
        start = len(self.base)
        # Images that were left out have no stamp, so the others are the photographs in the order of the rows.
        stamped = self.stamps[self.stamps.any(1)]
        numbers = [0, *itertools.accumulate(one != other for one, other in itertools.pairwise(photos[start:]))]
        if len(photos) > start and numbers[-1] + 1 == len(stamped):
            stamps[start:] = stamped[numbers]
        return stamps


def write_source_files(path: Path, files: SourceFiles) -> None:
    """Write what [`read_source_files`] reads."""
    text = np.array(json.dumps([asdict(shard) for shard in files.notes]))
    with new_file(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, stamps=files.stamps, notes=text, base=files.base)


def read_source_files(folder: Path) -> SourceFiles | None:
    """Return what [`write_source_files`] wrote; None if it is damaged or not there, as in a downloaded cache."""
    try:
        arrays = read_arrays(folder / SOURCE_FILES)
        notes = [ShardNotes(**shard) for shard in json.loads(str(arrays["notes"]))]
        return SourceFiles(arrays["stamps"], notes, *([arrays["base"]] if "base" in arrays else []))
    except (OSError, ValueError, KeyError, TypeError):
        return None
