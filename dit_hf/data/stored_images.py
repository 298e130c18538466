"""Undecoded images where they are stored: in memory, in a file of their own, or inside a shard that is not unpacked.

`datasets` stores an image as a struct of `bytes` and `path`. The path of one inside a shard is its address:
`parquet://COLUMN/ROW::FILE` or `tar://OFFSET+SIZE.SUFFIX::FILE`, where FILE is on this machine or on the Hub
(`hf://...`). Only readers of shards write addresses; paths that a dataset brings along are checked, see
`stored_paths`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset
from fsspec.core import url_to_fs

from ..storage import first_line

PARQUET, TAR = "parquet://", "tar://"
# Size, time of modification in ns, and inode of a file; of an image in a shard the inode is mixed with its place.
Stamp: TypeAlias = tuple[int, int, int]
NO_STAMP: Stamp = (0, 0, 0)
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0")
_BATCH = 32  # images of a parquet file that are decompressed at once
# Bytes of a file on the Hub that are requested at once: images follow one another, labels lie between images.
_IMAGES_AT_ONCE, _LABELS_AT_ONCE = 1 << 23, 1 << 18


class Address(NamedTuple):
    """Place of an image inside a shard.

    Attributes:
        file: Path or URL of the shard.
        column: Column of the bytes in a parquet file, such as `image.bytes`; empty in a tar.
        start: Row in a parquet file; offset in bytes in a tar.
        size: Number of bytes in a tar; 0 in a parquet file, where only reading tells it.
        suffix: Suffix of its name in a tar, such as `.jpg`.
    """

    file: str
    column: str
    start: int
    size: int = 0
    suffix: str = ""


def parquet_address(file: str, column: str, row: int) -> str:
    """Return the address of an image in a parquet file."""
    return f"{PARQUET}{column}/{row}::{file}"


def tar_address(file: str, offset: int, size: int, suffix: str) -> str:
    """Return the address of an image in a tar."""
    return f"{TAR}{offset}+{size}{suffix}::{file}"


def parse_address(path: str | None) -> Address | None:
    """Return the place that an address names; None for the path of a file."""
    if path is None or not path.startswith((PARQUET, TAR)):
        return None
    place, _, file = path.partition("://")[2].partition("::")
    if path.startswith(TAR):
        offset, _, rest = place.partition("+")
        size, dot, suffix = rest.partition(".")
        return Address(file, "", int(offset), int(size), dot + suffix)
    column, _, row = place.rpartition("/")
    return Address(file, column, int(row))


def stored_bytes(stored: dict[str, Any] | None) -> bytes | None:
    """Return the bytes of an undecoded image, a dict of `bytes` and `path`; None if it has none.

    Raises:
        OSError: if its file or shard cannot be read.
    """
    data, path = (stored or {}).get("bytes"), (stored or {}).get("path")
    if data is not None or not path:
        return data
    address = parse_address(path)
    return Path(path).read_bytes() if address is None else _read_shard(address)


def with_bytes(stored: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return an undecoded image with its bytes if it is inside a shard; one with a file of its own stays as it is.

    Shards are read in order: to be called in the order of the rows, before the images are given to threads. An error
    is about the whole shard, so that it must not count as one of a single image.

    Raises:
        OSError: if the shard cannot be read.
    """
    address = None if stored is None or stored["bytes"] is not None else parse_address(stored["path"])
    return stored if address is None else {**(stored or {}), "bytes": _read_shard(address)}


def read_image(stored: dict[str, Any] | None) -> tuple[bytes | None, Stamp]:
    """Return the bytes of an undecoded image, None if it has none, and its stamp.

    Raises:
        OSError: if its file or shard cannot be read.
    """
    path = (stored or {}).get("path")
    if parse_address(path):
        return stored_bytes(stored), image_stamp(stored)
    data = (stored or {}).get("bytes")
    if data is not None or not path:
        return data, NO_STAMP
    with open(path, "rb") as file:
        return file.read(), file_stamp(os.fstat(file.fileno()))


def image_stamp(stored: dict[str, Any] | None) -> Stamp:
    """Return the stamp of an undecoded image without reading it; that of no file if it is stored in memory.

    Raises:
        OSError: if its file does not exist.
    """
    path = (stored or {}).get("path")
    address = parse_address(path)
    if address is not None:
        size, time, inode = shard_version(address.file)
        place = f"{inode}/{address.column}/{address.start}/{address.size}"
        return size, time, int.from_bytes(hashlib.sha256(place.encode()).digest()[:7], "big")
    if not path or (stored or {}).get("bytes") is not None:
        return NO_STAMP
    return file_stamp(os.stat(path))


def image_paths(rows: Dataset) -> list[str | None]:
    """Return the path or address of each row's undecoded image, without reading bytes that are stored with it."""
    paths: list[str | None] = []
    for batch in rows.select_columns("image").with_format("arrow").iter(10_000):
        paths += pc.struct_field(batch["image"], "path").to_pylist()
    return paths


def in_any_order(address: Address) -> bool:
    """Check whether an image is read as fast at random as in the order of its shard."""
    return not address.column and not is_remote(address.file)


def image_size(address: Address) -> int:
    """Return the number of bytes of an image; for one in a parquet file on the Hub, the number of the whole file.

    Raises:
        OSError: if its shard cannot be read.
    """
    if not address.column:
        return address.size
    if is_remote(address.file):
        return shard_version(address.file)[0]
    return _column_sizes(address.file, address.column, shard_version(address.file))[address.start]


@functools.lru_cache(maxsize=1)
def _column_sizes(file: str, column: str, version: Stamp) -> list[int]:
    """Return the size of each value of a column of a parquet file, which has to be read for it."""
    sizes: list[int] = []
    for batch in open_parquet(file).iter_batches(_BATCH, columns=[column]):
        sizes += pc.fill_null(pc.binary_length(without_structs(batch.column(0))), 0).to_pylist()
    return sizes


def file_stamp(status: os.stat_result) -> Stamp:
    """Return what tells a file that has not changed, of its status."""
    # Some file systems number inodes with 64 bits; 63 of them fit the column.
    return status.st_size, status.st_mtime_ns, status.st_ino & (2**63 - 1)


def is_image(data: Any) -> bool:
    """Check whether a value of a column begins like the file of an image."""
    return isinstance(data, bytes) and data.startswith(_SIGNATURES)


def is_remote(file: str) -> bool:
    """Check for the URL of a shard that is not on this machine."""
    return "://" in file


def shard_version(file: str) -> Stamp:
    """Return what tells a shard that has not changed: the stamp of a file, and of one on the Hub size and content.

    Raises:
        OSError: if it does not exist.
    """
    return _remote_version(file) if is_remote(file) else file_stamp(os.stat(file))


@functools.cache
def _remote_version(file: str) -> Stamp:
    file_system, path = url_to_fs(file)
    info = file_system.info(path)
    # Git's hash of the file, or of the pointer to it, which names the hash of its content.
    content = info.get("blob_id") or file
    return info["size"], 0, int.from_bytes(hashlib.sha256(content.encode()).digest()[:7], "big")


# One shard is open at a time, because rows are read in their order.
_lock = threading.Lock()
_reader: tuple[tuple[str, str, Stamp], _ParquetReader | _TarReader] | None = None


def _read_shard(address: Address) -> bytes | None:
    """Return the bytes of an image inside a shard.

    Raises:
        OSError: if the shard cannot be read.
    """
    global _reader
    with _lock:
        try:
            key = address.file, address.column, shard_version(address.file)
            if _reader is None or _reader[0] != key:
                _reader = None  # closed before another one is opened
                shard = _ParquetReader(address.file, address.column) if address.column else _TarReader(address.file)
                _reader = key, shard
            return _reader[1].read(address)
        except Exception as error:  # file systems of shards raise errors of many classes
            _reader = None
            raise OSError(f"{address.file} cannot be read: {first_line(error)}") from error


class _TarReader:
    """Reads images of a tar by their offsets."""

    def __init__(self, file: str):
        self.stream = open_shard(file)

    def read(self, address: Address) -> bytes:
        self.stream.seek(address.start)
        data = self.stream.read(address.size)
        if len(data) < address.size:
            raise EOFError("it has become shorter")
        return data


class _ParquetReader:
    """Reads images of a column of a parquet file in the order of its rows, a few rows at a time."""

    def __init__(self, file: str, column: str):
        self.column, self.parquet = column, open_parquet(file)
        metadata = self.parquet.metadata
        groups = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self.starts = [0, *accumulate(groups)]  # first row of each row group
        self.batch, self.first = pa.array([], pa.binary()), 0
        self.batches: Iterator[pa.RecordBatch] = iter(())
        self.group = -1

    def read(self, address: Address) -> bytes | None:
        group = bisect_right(self.starts, address.start) - 1
        # From the beginning of its row group, unless it is further on in the one that is being read.
        if address.start < self.first or group > self.group + 1 or self.group < 0:
            self.batches = self.parquet.iter_batches(_BATCH, range(group, len(self.starts) - 1), [self.column])
            self.batch, self.first = self.batch[:0], self.starts[group]
        while address.start >= self.first + len(self.batch):
            self.first += len(self.batch)
            self.batch = without_structs(next(self.batches).column(0))
        self.group = bisect_right(self.starts, self.first) - 1
        return self.batch[address.start - self.first].as_py()


def without_structs(values: pa.Array) -> pa.Array:
    """Return a column of structs with one field each as the column of that field."""
    while pa.types.is_struct(values.type):
        values = values.flatten()[0]
    return values


def open_parquet(file: str, labels: bool = False) -> pq.ParquetFile:
    """Open a parquet file on this machine or on the Hub, to read its images or its labels."""
    # Without pre-buffering, which would hold whole row groups: some writers make one of the whole file.
    if not is_remote(file):
        return pq.ParquetFile(file, memory_map=True, pre_buffer=False)
    at_once = _LABELS_AT_ONCE if labels else _IMAGES_AT_ONCE
    return pq.ParquetFile(open_shard(file, at_once), buffer_size=at_once, pre_buffer=False)


def open_shard(file: str, at_once: int = _IMAGES_AT_ONCE) -> BinaryIO:
    """Open a file on this machine or on the Hub, of which `at_once` bytes are requested at once."""
    # Not by fsspec on this machine, which reads brackets and asterisks of a path as patterns.
    return fsspec.open(file, "rb", block_size=at_once).open() if is_remote(file) else open(file, "rb")
