"""Shards of a latent cache: which rows each one holds, its Arrow file and its notes.

A shard is finished once its notes (a JSON file) exist; a resumed build never encodes it again. Which images a shard
holds depends on the source alone, not on the number of processes or the batch size.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value

from ..data.transforms import Geometry
from ..storage import first_line, new_file, read_json, sha256
from .vae import CHUNK_PIXELS, VAE, has_posterior

MIN_SHARD, MAX_SHARD, NUM_SHARDS = 512, 65536, 256
MAX_BATCH, BATCH_PIXELS = 64, 64 * 256 * 256
# Each record batch of an open file takes some hundred bytes of memory a column, so there should be few of them.
RECORD_BATCH_ROWS, RECORD_BATCH_BYTES = 4096, 2**28
IMAGE_SHA256 = "image_sha256"


@dataclass(frozen=True)
class Job:
    """Everything that a process needs to encode shards of one cache, beside the rows of the source.

    Attributes:
        folder: The folder of the shards; `folder / "vae"` is the VAE.
        geometry: Crop and resolution of the images; the resolution is set.
        latent_shape: (channels, height, width).
        flip: Whether each image is encoded mirrored too.
        hold_out: Whether 2 % of the training images become validation images, because the source has none.
        features: Features of the cache.
        num_rows: Rows of the source.
        batch_size: Images that the VAE encodes at once.
        shard_size: Images in one shard.
        sha256: Hash of the cache's identity.
        total: Number of shards of the whole cache, by which files are named: also those of other parts, and those of
            the cache that images are added to.
        first: Number of this job's first shard among them.
        step: Distance between the numbers of this job's shards.
    """

    folder: Path
    geometry: Geometry
    latent_shape: tuple[int, int, int]
    flip: bool
    hold_out: bool
    features: Features
    num_rows: int
    batch_size: int
    shard_size: int
    sha256: str
    total: int
    first: int = 0
    step: int = 1

    @property
    def num_shards(self) -> int:
        """Number of shards to encode; the last one may be shorter."""
        return -(-self.num_rows // self.shard_size)

    @property
    def bytes_per_row(self) -> int:
        """Bytes that a row takes on the disk, about."""
        latents = sum(isinstance(feature, List) for feature in self.features.values())
        return 2 * math.prod(self.latent_shape) * latents + 2 * len(self.features) + 128  # id and hash are strings

    def rows_of(self, shard: int) -> range:
        """Return the rows of the source that go into `shard`."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_rows))

    def file_name(self, shard: int) -> str:
        """Return the name of the shard's file."""
        return shard_name(self.first + shard * self.step, self.total)

    def path(self, shard: int) -> Path:
        """Return the shard's file."""
        return self.folder / self.file_name(shard)

    def notes_path(self, shard: int) -> Path:
        """Return the file whose existence marks the shard as finished."""
        return self.folder / "building" / f"{shard:05}.json"

    def stamps_path(self, shard: int) -> Path:
        """Return the file of the stamps of the shard's images; see `reuse.py`."""
        return self.folder / "building" / f"{shard:05}.npy"

    def notes(self, shard: int) -> ShardNotes:
        """Read the notes of a finished shard.

        Raises:
            ValueError: naming the file, if they are damaged.
        """
        names = [each.name for each in fields(ShardNotes)]
        content = read_json(self.notes_path(shard), keys=[name for name in names if name != "faces"])
        return ShardNotes(**{name: content[name] for name in names if name in content})

    def stamps(self, shard: int) -> np.ndarray:
        """Read the stamps of a shard's images, int64 [rows, 3]; where they are damaged, those of no file."""
        shape = len(self.rows_of(shard)), 3
        with contextlib.suppress(OSError, ValueError, EOFError):
            stamps = np.load(self.stamps_path(shard))
            if stamps.shape == shape and stamps.dtype == np.int64:
                return stamps
        return np.zeros(shape, np.int64)

    def unfinished(self) -> list[int]:
        """Return the shards to encode."""
        return [shard for shard in range(self.num_shards) if not self.notes_path(shard).is_file()]

    def forget_damaged(self) -> None:
        """Let finished shards that are damaged, or whose notes are, count as unfinished."""
        for shard in range(self.num_shards):
            if self.notes_path(shard).is_file() and not self._is_intact(shard):
                self.notes_path(shard).unlink()

    def _is_intact(self, shard: int) -> bool:
        path = self.path(shard)
        try:
            notes = self.notes(shard)
        except ValueError:
            return False
        return path.is_file() and path.stat().st_size == notes.size and sha256(path) == notes.sha256


@dataclass
class ShardNotes:
    """Summary of an encoded shard.

    Attributes:
        left_out: Id and reason of each image that could not be used.
        sums: Sums over all latent pixels of mean, squared mean and variance of the posterior, [3][channels].
        count: Number of latent pixels in each sum.
        size: Size of the shard's file in bytes.
        sha256: SHA-256 of the shard's file.
        faces: With crop `face`, id, side in pixels of the photograph and score of each face.
    """

    left_out: list[tuple[str, str]] = field(default_factory=list)
    sums: list[list[float]] = field(default_factory=list)
    count: int = 0
    size: int = 0
    sha256: str = ""
    faces: list[tuple[str, float, float]] = field(default_factory=list)


def shard_name(number: int, total: int) -> str:
    """Return the name of a shard's file, as `datasets` names the files of a saved dataset."""
    return f"data-{number:05}-of-{total:05}.arrow"


def plan_sizes(num_rows: int, resolution: tuple[int, int]) -> tuple[int, int]:
    """Return batch size and shard size for `num_rows` images of `resolution` (height, width).

    The VAE encodes at most 64 images at once, 16 of 256 px, fewer of larger ones. There are at most 256 shards, up to
    16 million images.
    """
    pixels = resolution[0] * resolution[1]
    unit = max(1, min(MAX_BATCH, BATCH_PIXELS // pixels))
    shard = min(MAX_SHARD, max(MIN_SHARD, -(-num_rows // NUM_SHARDS)))
    # Rounded up to multiples of `unit`, as version 0.1.0 did, so that its unfinished caches have the same shards.
    return max(1, min(unit, CHUNK_PIXELS // pixels)), -(-shard // unit) * unit


def latent_columns(vae: VAE, flip: bool) -> list[str]:
    """Return the names of a cache's latent columns."""
    names = ["latent_mean", "latent_std"] if has_posterior(vae) else ["latent_mean"]
    return names + [f"{name}_flip" for name in names] if flip else names


def cache_features(
    rows: Dataset, vae: VAE, shape: tuple[int, int, int], flip: bool, image_sha256: bool = True
) -> Features:
    """Return the features of a cache of `rows`: id, split, hash of the image, latents of `shape`, conditions.

    Raises:
        ValueError: if a condition has the name of another column.
    """
    columns = {"id": Value("string"), "split": Value("string")}
    if image_sha256:  # which format 2 does not have
        columns[IMAGE_SHA256] = Value("string")
    columns |= dict.fromkeys(latent_columns(vae, flip), List(Value("float16"), length=math.prod(shape)))
    conditions = {k: feature for k, feature in rows.features.items() if k not in ("id", "split", "image")}
    taken = conditions.keys() & columns.keys()
    if taken:
        raise ValueError(f"the source has a column {min(taken)}, which is a column of the cache too; rename it")
    return Features({**columns, **conditions})


def spell_features(features: Features) -> dict[str, Any]:
    """Return features as JSON that datasets reads from 2.14 on: `List` is `Sequence`, its name before 4.0."""
    spelled = features.to_dict()
    return {k: {**v, "_type": "Sequence"} if v["_type"] == "List" else v for k, v in spelled.items()}


class ShardWriter:
    """Writer of a shard's Arrow file, in record batches of 4,096 rows whatever the sizes of the parts it is given.

    Record batches of very large latents have fewer rows, to keep the memory below a gigabyte.

    Args:
        path: The file.
        features: Features of the cache.
    """

    def __init__(self, path: Path, features: Features):
        metadata = {"huggingface": json.dumps({"info": {"features": spell_features(features)}})}
        self.schema = features.arrow_schema.with_metadata(metadata)
        lists = [field.type for field in self.schema if pa.types.is_fixed_size_list(field.type)]
        row_bytes = sum(kind.list_size * kind.value_type.bit_width // 8 for kind in lists)
        self.rows = max(1, min(RECORD_BATCH_ROWS, RECORD_BATCH_BYTES // max(1, row_bytes)))
        self._waiting: list[pa.RecordBatch] = []
        self._file = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._file, self.schema)

    def write(self, columns: dict[str, pa.Array]) -> None:
        """Add rows, all columns of the cache by name."""
        rows = pa.record_batch([columns[name] for name in self.schema.names], schema=self.schema)
        while len(rows):
            room = self.rows - sum(map(len, self._waiting))
            self._waiting.append(rows[:room])
            rows = rows[room:]
            if room == len(self._waiting[-1]):
                self._flush()

    def close(self) -> None:
        """Write what waits and close the file."""
        self._flush()
        self._stream.close()
        self._file.close()

    def _flush(self) -> None:
        """Write what waits as one record batch."""
        if self._waiting:
            self._stream.write_table(pa.Table.from_batches(self._waiting).combine_chunks())
        self._waiting = []


def shard_files(folder: Path) -> list[Path]:
    """Return the shards of a finished cache, in their order."""
    return [
        folder / file["filename"] for file in read_json(folder / "state.json", keys=["_data_files"])["_data_files"]
    ]


def rewrite_shard(source: Path, target: Path, features: Features, kept: np.ndarray) -> None:
    """Write a shard anew with the `kept` of its rows, bool [rows], and these features, whose types are the same.

    Raises:
        ValueError: naming the file, if it is damaged.
    """
    with new_file(target) as partial, contextlib.closing(ShardWriter(partial, features)) as writer:
        start = 0
        for rows in open_shards([source]).to_batches():
            left = rows.filter(pa.array(kept[start : start + len(rows)]))
            writer.write(dict(zip(left.schema.names, left.columns, strict=True)))
            start += len(rows)


def open_shards(paths: list[Path]) -> pa.Table:
    """Map the Arrow files of a cache into memory as one table.

    Random reads are announced to the system: otherwise it reads up to a megabyte around each of them.

    Raises:
        ValueError: naming the file, if one is damaged.
    """
    tables: list[pa.Table] = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_RANDOM"):  # not on Windows
                mapped.madvise(mmap.MADV_RANDOM)
            # The buffer keeps the map open as long as an array needs it.
            table = pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()
            table.validate()
            # Metadata differs where a cache of format 2 was finished by this version.
            table = table.replace_schema_metadata(None)
            if tables and table.schema != tables[0].schema:
                raise ValueError(f"other columns than {paths[0].name}")
        except (ValueError, OSError) as error:  # of Arrow too
            raise ValueError(f"{path} is damaged ({first_line(error)}); make the cache again") from error
        tables.append(table)
    return pa.concat_tables(tables)


def check_name(folder: Path) -> None:
    """Refuse a folder that datasets cannot open: it takes `::` for a chain of file systems.

    Raises:
        ValueError: naming the folder.
    """
    if "::" in str(folder.resolve()):
        raise ValueError(f"{folder.resolve()}: datasets cannot open a folder with :: in its path; name another one")


def load_rows(folder: Path) -> Dataset:
    """Open the rows of a cache, memory-mapped, whose manifest has been checked or is not written yet.

    Raises:
        ValueError: naming the folder, if its files are damaged.
    """
    check_name(folder)
    try:
        return Dataset.load_from_disk(str(folder))
    except Exception as error:  # datasets and Arrow have an exception for each kind of damage
        raise ValueError(f"{folder} is damaged ({first_line(error)}); make the cache again") from error


def latent_array(latents: np.ndarray) -> pa.FixedSizeListArray:
    """Return latents [rows, values] as an Arrow array of lists, without a copy."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(latents).reshape(-1)), latents.shape[1])
