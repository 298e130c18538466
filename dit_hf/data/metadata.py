"""Read metadata files beside images: `metadata.csv`, `.jsonl` and `.parquet` with a `file_name` column."""

from __future__ import annotations

import codecs
import contextlib
import csv
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from ..storage import first_line, is_lfs_pointer, parse_json
from .splits import split_named

DELIMITERS = (",", ";", "\t")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass
class Table:
    """Rows of a metadata file or list.

    Attributes:
        name: Name of the file, for messages.
        rows: Values by column, by the key of the image. A row that cannot be used is None.
        spelled: The key as the file spells it, by key.
    """

    name: str
    rows: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)


def read_metadata(folder: Path, names: list[str], left_out: list[tuple[str, str]]) -> Table:
    """Read the metadata files `names` (relative paths) of `folder` into one table by relative path of the image.

    Rows that cannot be used are added to `left_out` with the reason.

    Raises:
        ValueError: if a file cannot be read, a .csv has no `file_name` column, two columns have one name, or two files
            describe the same image.
    """
    table = Table(", ".join(dict.fromkeys(PurePosixPath(name).name for name in names)))
    files: dict[str, str] = {}
    for name in names:
        for number, row in _metadata_rows(folder / name, name, left_out):
            row = {"split" if str(column).lower() == "split" else column: value for column, value in row.items()}
            # Key: `file_name` is relative to the folder of the metadata file.
            file_name = row.pop("file_name", None)
            if not isinstance(file_name, str) or not file_name:
                left_out.append((f"{name}:{number}", "a row without file_name"))
                continue
            if "\\" in file_name and not (folder / name).with_name(file_name).exists():  # written on Windows
                file_name = file_name.replace("\\", "/")
            key = os.path.normpath(PurePosixPath(name).parent / file_name).replace(os.sep, "/")
            if files.setdefault(key, name) != name:
                raise ValueError(
                    f"{files[key]} and {name} both describe {key}: --exclude {name} reads the first alone"
                )
            if key in table.rows:
                left_out.append((key, f"duplicate row: {number} of {name}"))
                continue

            # Split: an unknown name must not be read as any of the known splits.
            table.spelled[key] = key
            if row.get("split") is not None:
                split = split_named(str(row["split"]))
                if split is None:
                    left_out.append((key, f"split {row['split']!r} is unknown, in row {number} of {name}"))
                    table.rows[key] = None
                    continue
                row["split"] = split
            table.rows[key] = row
    return table


def _metadata_rows(path: Path, name: str, left_out: list[tuple[str, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of one metadata file with their numbers, from 1."""
    if path.suffix == ".parquet":
        import pyarrow.parquet  # not loaded by `import pyarrow`, and seldom needed

        _refuse_pointer(path)
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
        yield from enumerate(rows, 1)
    elif path.suffix == ".csv":
        with csv_errors(path), open_text(path) as file:
            # DictReader files extra values under the key None, and fills up missing ones with None.
            reader = csv.DictReader(file, delimiter=delimiter(path, "file_name"))
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            check_header(path, reader.fieldnames or [], "file_name")
            for number, row in enumerate(reader, 1):
                if None in row or None in row.values():
                    left_out.append((row.get("file_name") or f"{name}:{number}", f"row {number} of {name} is ragged"))
                else:
                    yield number, dict(row)
    else:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    parsed = parse_json(line)
                except ValueError:
                    parsed = None
                if isinstance(parsed, dict):
                    yield number, parsed
                else:
                    left_out.append((f"{name}:{number}", "not a JSON object"))


def _refuse_pointer(path: Path) -> None:
    if is_lfs_pointer(path):
        raise ValueError(f"{path} is a pointer of git-lfs, not the file: run git lfs pull")


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a text file of UTF-8 or, with a byte order mark, UTF-16.

    Raises:
        ValueError: if it is in another encoding, or a pointer of git-lfs.
    """
    _refuse_pointer(path)
    with open(path, "rb") as binary:
        is_utf16 = binary.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        with open(path, encoding="utf-16" if is_utf16 else "utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.object[error.start]:#x}; Windows writes cp1252): save it as UTF-8"
        ) from error


def delimiter(path: Path, column: str) -> str:
    """Return what separates the columns of a csv: the first of comma, semicolon and tab by which `column` is one."""
    with csv_errors(path), open_text(path) as file:
        header = file.readline()
        headers = {mark: next(csv.reader([header], delimiter=mark), []) for mark in DELIMITERS}
    return next((mark for mark, names in headers.items() if column in [name.strip() for name in names]), ",")


def check_header(path: Path, names: Sequence[str], column: str) -> None:
    """Refuse the header of a csv without the column of file names, or with a name twice.

    Raises:
        ValueError: naming the file and the columns.
    """
    if column not in names:
        raise ValueError(f"{path} has no column {column}; it has {', '.join(names) or 'no columns'}")
    check_names_differ(path, names)


def check_names_differ(path: Path, names: Sequence[str]) -> None:
    """Refuse columns of one name, of which one would be lost.

    Raises:
        ValueError: naming the file and the names.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{path} has columns of one name: {', '.join(twice)}")


@contextlib.contextmanager
def csv_errors(path: Path) -> Iterator[None]:
    """Turn errors of the csv module into one line that names the file."""
    try:
        yield
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read ({error}); is there a quote that is not closed?") from error


def join_tables(
    keys: dict[str, str], tables: list[Table], left_out: list[tuple[str, str]]
) -> dict[str, dict[str, Any]]:
    """Merge the rows of each image that has a usable row in every table.

    Args:
        keys: The key of each image in the tables, by its id.
        tables: Tables whose columns are merged; of equal names, the last one counts.
        left_out: List to which images without a row, and rows without an image, are added.

    Returns:
        Values by column, by id, in the order of `keys`.
    """
    # Rows without an image, once for all tables, unless they are listed for another reason already.
    present = set(keys.values())
    missing: dict[str, tuple[str, list[str]]] = {}
    listed = {name for name, _ in left_out}
    for table in tables:
        for key, row in table.rows.items():
            spelled = table.spelled[key]
            if row is not None and key not in present and spelled not in listed:
                missing.setdefault(key, (spelled, []))[1].append(table.name)
    left_out += [(name, f"no such picture; it has a row in {' and '.join(files)}") for name, files in missing.values()]

    # Images without a row, and merged rows.
    described: dict[str, dict[str, Any]] = {}
    for image_id, key in keys.items():
        without = [table.name for table in tables if key not in table.rows]
        if without:
            left_out.append((image_id, f"no row in {' and '.join(without)}"))
        rows = [table.rows[key] for table in tables if key in table.rows]
        if not without and None not in rows:  # an unusable row is in `left_out` already
            described[image_id] = {name: value for row in rows if row is not None for name, value in row.items()}
    return described
