"""Read parquet shards without copying them: labels at once, images as the addresses where they are stored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from datasets.table import table_cast

from ..storage import first_line
from .stored_images import is_image, is_remote, open_parquet, parquet_address, parse_address, without_structs

_THREADS = 8  # shards that are read at once, since each request to the Hub has to be waited for


def load_parquet(files: Sequence[str | Path], declared: Features | None = None) -> Dataset:
    """Load parquet shards as one dataset, whose images are not read: their paths are addresses in the shards.

    Args:
        files: Paths or URLs of the shards, in the order of the rows.
        declared: Features that the source declares; None takes those of the first shard.

    Returns:
        A dataset in memory with the columns of the shards. Bytes that are images have the feature `Image`, whether or
        not it is declared. Other bytes and lists, which nothing needs, are null.

    Raises:
        ValueError: naming a shard that cannot be read.
        datasets.table.CastError: if the shards differ in their columns.
    """
    paths = [str(file) if is_remote(str(file)) else os.path.abspath(file) for file in files]
    features = declared or Features.from_arrow_schema(_open(paths[0]).schema_arrow)
    features = Features({name: _find_images(paths, name, feature) for name, feature in features.items()})
    read = Features({name: _read_feature(feature) for name, feature in features.items()})
    with ThreadPoolExecutor(_THREADS) as pool:
        tables = pool.map(lambda path: table_cast(_read_shard(path, features), read.arrow_schema), paths)
        return Dataset(pa.concat_tables(tables))


def _open(path: str) -> pq.ParquetFile:
    try:
        return open_parquet(path, labels=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: {first_line(error)}") from error


def _find_images(paths: list[str], column: str, feature: Any) -> Any:
    """Return a feature in which bytes, or structs of bytes and path, are `Image` if the first of them is an image."""
    if isinstance(feature, dict) and set(feature) == {"bytes", "path"}:
        return Image() if is_image(_first_value(paths, f"{column}.bytes")) else feature
    if isinstance(feature, dict):
        return {name: _find_images(paths, f"{column}.{name}", inner) for name, inner in feature.items()}
    if isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"):
        return Image() if is_image(_first_value(paths, column)) else feature
    return feature


def _first_value(paths: list[str], column: str) -> Any:
    """Return the first value of a column that is not null."""
    for path in paths:
        for batch in _open(path).iter_batches(1, columns=[column]):
            if batch.num_columns and (value := without_structs(batch.column(0))[0].as_py()) is not None:
                return value
    return None


def _read_feature(feature: Any) -> Any:
    """Return the feature that a column has when it is read: lists of a fixed length would take memory for nulls."""
    if isinstance(feature, dict):
        return {name: _read_feature(inner) for name, inner in feature.items()}
    return feature if isinstance(feature, Value | ClassLabel | Image) else List(Value("null"))


def _read_shard(path: str, features: Features) -> pa.Table:
    """Read the columns of one shard."""
    parquet = _open(path)
    own = Features.from_arrow_schema(parquet.schema_arrow)
    names = parquet.schema_arrow.names
    try:
        columns = [_read_column(path, parquet, name, features.get(name, own[name])) for name in names]
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: {first_line(error)}") from error
    return pa.table(dict(zip(names, columns, strict=True)))


def _read_column(path: str, parquet: pq.ParquetFile, column: str, feature: Any) -> pa.Array:
    """Read one column, or one inside structs, whose names are joined by dots."""
    count = parquet.metadata.num_rows
    if isinstance(feature, Image):
        return pa.StructArray.from_arrays(
            [pa.nulls(count, pa.binary()), pa.array(_addresses(path, parquet, column), pa.string())], ["bytes", "path"]
        )
    if isinstance(feature, dict):
        inner = [_read_column(path, parquet, f"{column}.{name}", own) for name, own in feature.items()]
        return pa.StructArray.from_arrays(inner, [*feature])
    if isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "binary" not in feature.dtype):
        return without_structs(parquet.read([column]).column(0).combine_chunks())
    return pa.nulls(count, feature.pa_type if isinstance(feature, Value) else pa.list_(pa.null()))


def _addresses(path: str, parquet: pq.ParquetFile, column: str) -> list[str | None]:
    """Return where each image of a column is stored: its address, or the path that stands in place of its bytes."""
    leaves = [parquet.schema.column(number).path for number in range(len(parquet.schema))]
    data, beside = (f"{column}.bytes", f"{column}.path") if f"{column}.bytes" in leaves else (column, f"{column}.path")
    addresses: list[str | None] = []
    for group in range(parquet.metadata.num_row_groups):
        first, own = len(addresses), parquet.metadata.row_group(group)
        addresses += [parquet_address(path, data, row) for row in range(first, first + own.num_rows)]
        statistics = own.column(leaves.index(data)).statistics if data in leaves else None
        if statistics is None or not statistics.has_null_count or statistics.null_count:
            # Some are missing or have a path alone: only reading tells which.
            missing = _missing(parquet, group, data) if data in leaves else range(own.num_rows)
            paths = _paths(parquet, group, beside) if beside in leaves else [None] * own.num_rows
            for row in missing:
                # A stored path must not be taken for an address.
                addresses[first + row] = paths[row] if parse_address(paths[row]) is None else None
    return addresses


def _missing(parquet: pq.ParquetFile, group: int, column: str) -> list[int]:
    """Return the rows of a row group that have no value, counted from its first."""
    missing, start = list[int](), 0
    for batch in parquet.iter_batches(32, [group], [column]):
        valid = without_structs(batch.column(0)).is_valid().to_pylist()
        missing += [start + row for row, is_valid in enumerate(valid) if not is_valid]
        start += len(valid)
    return missing


def _paths(parquet: pq.ParquetFile, group: int, column: str) -> list[str | None]:
    """Return the values of a column of a row group."""
    return without_structs(parquet.read_row_group(group, [column]).column(0).combine_chunks()).to_pylist()
