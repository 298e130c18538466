"""Folders of pictures: their files, and the lists beside them that say what the pictures show.

Known are CelebA (as Kaggle ships it, with the original .txt lists, or flat), CelebAMask-HQ, folders with a
`metadata.csv`, `metadata.jsonl` or `metadata.parquet` (as `datasets`' imagefolder reads them), folders whose
subfolders are classes or splits, and plain ones. Whatever cannot be used is returned with the reason.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
OTHER_PICTURES = (".heic", ".heif", ".jp2", ".jxl")  # which are not read, but listed as left out
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
CELEBA_LISTS = ("list_attr_celeba", "CelebAMask-HQ-attribute-anno", "list_eval_partition")
CELEBA_HQ_MAPPING = "CelebA-HQ-to-CelebA-mapping"  # which picture of CelebA each one of CelebA-HQ was made of
# Folders of aligned faces, by which they are told from the masks and the pictures in the wild that come beside them.
CELEBA_PICTURES = ("img_align_celeba", "img_align_celeba_png", "CelebA-HQ-img")
CELEBA_PARTITION = {"0": "train", "1": "validation", "2": "test"}
CACHE_INFO = "latents.json"  # by which a folder is a latent cache
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass
class Folder:
    """The pictures of a folder in the order of their names.

    Attributes:
        paths: The file of each picture by its id, relative to the folder.
        sizes: Its size in bytes.
        columns: What the lists say of each picture, by name of the column; one value a picture, in order.
        left_out: Ids (escaped where they are no UTF-8) that cannot be used, with the reason.
    """

    paths: dict[str, str] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class _Table:
    """The rows of a list: values by column, by the key of the picture."""

    name: str
    rows: dict[str, dict[str, Any]]


def read_folder(folder: Path) -> Folder:
    """Find the pictures of `folder` and its subfolders (hidden files and names with `__` in front are passed over).

    Raises:
        ValueError: for a list that cannot be read at all.
    """
    result = Folder()
    sizes, lists = _scan(folder, result.left_out)
    celeba = [name for name in lists if PurePosixPath(name).name not in METADATA]
    if celeba:
        paths = _celeba_pictures(sizes, result.left_out)
        tables = _celeba_tables(folder, celeba, result.left_out)
        keys = {image_id: PurePosixPath(image_id).stem for image_id in paths}
        described = _join(keys, tables, result.left_out)
    else:
        paths = {name: name for name in sizes}
        metadata = [name for name in lists if PurePosixPath(name).name in METADATA]
        if metadata:
            tables = [_metadata_table(folder, metadata, result.left_out)]
            described = _with_splits(_join(paths, tables, result.left_out), result.left_out)
        else:
            described = _describe_by_subfolder(list(paths))
    result.paths = {image_id: paths[image_id] for image_id in described}
    result.sizes = [sizes[path] for path in result.paths.values()]
    names = dict.fromkeys(name for row in described.values() for name in row)
    result.columns = {name: [row.get(name) for row in described.values()] for name in names}
    return result


def _scan(folder: Path, left_out: list[tuple[str, str]]) -> tuple[dict[str, int], list[str]]:
    """Sizes of the pictures by relative path, and the lists, in the order of their names."""
    sizes: dict[str, int] = {}
    lists: list[str] = []
    for name, entry in walk(str(folder), "", set()):
        suffix = PurePosixPath(name).suffix.lower()
        if suffix not in EXTENSIONS:
            if entry.name in METADATA or PurePosixPath(name).stem in (*CELEBA_LISTS, CELEBA_HQ_MAPPING):
                lists.append(name)
            elif suffix in OTHER_PICTURES:
                left_out.append((printable(name), f"{suffix} is not read: convert it to .jpg or .png"))
            continue
        try:
            name.encode()
            status = entry.stat()
        except UnicodeEncodeError:
            left_out.append((printable(name), "its name is not UTF-8"))
        except OSError as error:
            left_out.append((name, error.strerror or str(error)))
        else:
            if stat.S_ISREG(status.st_mode):
                sizes[name] = status.st_size
            else:
                left_out.append((name, "not a regular file"))
    return sizes, lists


def walk(folder: str, prefix: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All files below `folder` with their relative names; links are followed, each folder is visited once.

    A latent cache among them is passed over: its sheet is no picture of the source.
    """
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    if any(entry.name == CACHE_INFO for entry in ordered):
        return
    for entry in ordered:
        if entry.name.startswith((".", "__")):
            continue
        if entry.is_dir():
            yield from walk(entry.path, f"{prefix}{entry.name}/", seen)
        else:
            yield f"{prefix}{entry.name}", entry


def printable(name: str) -> str:
    """A file name with the bytes that are no UTF-8 written as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _celeba_pictures(sizes: dict[str, int], left_out: list[tuple[str, str]]) -> dict[str, str]:
    """The pictures of CelebA by file name, which is how its lists name them wherever the folder puts them."""
    aligned = [name for name in sizes if set(PurePosixPath(name).parts) & set(CELEBA_PICTURES)]
    paths: dict[str, str] = {}
    stems: set[str] = set()
    for name in aligned or sizes:
        image_id, stem = PurePosixPath(name).name, PurePosixPath(name).stem
        if stem in stems:
            left_out.append((name, "another picture has the same number"))
        else:
            paths[image_id] = name
            stems.add(stem)
    return paths


def _celeba_tables(folder: Path, names: list[str], left_out: list[tuple[str, str]]) -> list[_Table]:
    """The attribute list and the partition; where one is there as .csv and as .txt, the .csv."""
    tables = []
    chosen = {PurePosixPath(name).stem: name for name in sorted(names, reverse=True)}
    mapping = chosen.pop(CELEBA_HQ_MAPPING, None)
    for stem, name in sorted(chosen.items()):
        header, lines = _celeba_lines(folder / name)
        columns = ["split"] if stem == "list_eval_partition" else header
        table = _Table(PurePosixPath(name).name, {})
        for number, (image_id, *values) in lines:
            key = PurePosixPath(image_id).stem
            reason = _celeba_fault(stem, columns, values)
            if key in table.rows:
                left_out.append((image_id, f"duplicate row: line {number} of {table.name}"))
            elif reason:
                left_out.append((image_id, f"{reason} in line {number} of {table.name}"))
                table.rows[key] = {}
            else:
                if stem == "list_eval_partition":
                    values = [CELEBA_PARTITION[values[0]]]
                table.rows[key] = {"": image_id, **dict(zip(columns, values, strict=True))}
        if mapping and stem == "list_eval_partition":  # this one names the pictures of CelebA
            _, lines = _celeba_lines(folder / mapping)
            origins = {index: PurePosixPath(name).stem for _, (index, *_, name) in lines[1:]}
            table.rows = {index: table.rows[key] for index, key in origins.items() if key in table.rows}
        tables.append(table)
    return tables


def _celeba_lines(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Names of the columns, and the numbered rows that are not blank, of a .csv or .txt list."""
    with _readable(path), open(path, encoding="utf-8-sig", errors="backslashreplace", newline="") as file:
        rows = list(csv.reader(file)) if path.suffix == ".csv" else [line.split() for line in file]
    numbered = [(number, row) for number, row in enumerate(rows, 1) if row]
    if path.suffix == ".csv":
        return numbered[0][1][1:] if numbered else [], numbered[1:]
    if numbered and len(numbered[0][1]) == 1:  # the number of rows, the names of the columns, the rows
        return numbered[1][1] if numbered[1:] else [], numbered[2:]
    return [], numbered


def _celeba_fault(stem: str, columns: list[str], values: list[str]) -> str | None:
    if len(values) != len(columns):
        return f"{len(values)} values instead of {len(columns)}"
    allowed = CELEBA_PARTITION if stem == "list_eval_partition" else ("-1", "0", "1")
    wrong = [value for value in values if value not in allowed]
    return f"{wrong[0]!r} is none of {', '.join(allowed)}" if wrong else None


def _metadata_table(folder: Path, names: list[str], left_out: list[tuple[str, str]]) -> _Table:
    table = _Table(", ".join(dict.fromkeys(PurePosixPath(name).name for name in names)), {})
    for name in names:
        for number, row in _metadata_rows(folder / name, name, left_out):
            file_name = row.pop("file_name", None)
            if not isinstance(file_name, str) or not file_name:
                left_out.append((f"{name}:{number}", "a row without file_name"))
                continue
            key = os.path.normpath(PurePosixPath(name).parent / file_name).replace(os.sep, "/")
            if key in table.rows:
                left_out.append((key, f"duplicate row: {number} of {name}"))
                continue
            if row.get("split") is not None:
                split = SPLITS.get(str(row["split"]).lower())
                if split is None:
                    left_out.append((key, f"split {row['split']!r} is unknown, in row {number} of {name}"))
                    table.rows[key] = {}
                    continue
                row["split"] = split
            table.rows[key] = {"": key, **row}
    return table


def _metadata_rows(path: Path, name: str, left_out: list[tuple[str, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
        return
    with _readable(path), open(path, encoding="utf-8-sig", errors="backslashreplace", newline="") as file:
        if path.suffix == ".csv":
            reader = csv.DictReader(file)
            if "file_name" not in (reader.fieldnames or []):
                raise ValueError(f"{path} has no column file_name; it has {', '.join(reader.fieldnames or [])}")
            for number, row in enumerate(reader, 1):
                if None in row or None in row.values():
                    left_out.append((row.get("file_name") or f"{name}:{number}", f"row {number} of {name} is ragged"))
                else:
                    yield number, dict(row)
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except json.JSONDecodeError as error:
                found = error
            if isinstance(found, dict):
                yield number, found
            else:
                left_out.append((f"{name}:{number}", "not a JSON object"))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What csv cannot read, in words."""
    try:
        yield
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read ({error}); is there a quote that is not closed?") from error


def _join(keys: dict[str, str], tables: list[_Table], left_out: list[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """What the tables say of each picture (`keys`: the tables' key of each id) that has a good row in all of them."""
    present = set(keys.values())
    missing: dict[str, tuple[str, list[str]]] = {}
    told = {name for name, _ in left_out}
    for table in tables:
        for key, row in table.rows.items():
            if row and key not in present and row[""] not in told:
                missing.setdefault(key, (row[""], []))[1].append(table.name)
    left_out += [(name, f"no such picture; it has a row in {' and '.join(files)}") for name, files in missing.values()]
    described: dict[str, dict[str, Any]] = {}
    for image_id, key in keys.items():
        without = [table.name for table in tables if key not in table.rows]
        if without:
            left_out.append((image_id, f"no row in {' and '.join(without)}"))
        elif all(table.rows[key] for table in tables):  # the fault of a bad row is in the list already
            merged = {name: value for table in tables for name, value in table.rows[key].items() if name}
            described[image_id] = merged
    return described


def _describe_by_subfolder(names: list[str]) -> dict[str, dict[str, Any]]:
    """Split by the first folder, class by the last, where all pictures agree that these are what folders mean here."""
    parents = [PurePosixPath(name).parts[:-1] for name in names]
    splits = _splits(names)
    if splits:
        parents = [parts[1:] for parts in parents]
    classes = [parts[-1] if parts else None for parts in parents]
    has_classes = len(set(classes)) > 1 and len({len(parts) for parts in parents}) == 1
    if has_classes and all(str(label).isdigit() and str(label).endswith("000") for label in classes):
        has_classes = False  # a thousand pictures in each, as FFHQ comes
    return {
        name: ({"split": splits[name]} if splits else {}) | ({"class": label} if has_classes else {})
        for name, label in zip(names, classes, strict=True)
    }


def _splits(names: Iterable[str]) -> dict[str, str]:
    """The split of each picture by its first folder; nothing unless all are in the folder of one."""
    first = {name: PurePosixPath(name).parts[0].lower() for name in names}
    found = {name: SPLITS[folder] for name, folder in first.items() if folder in SPLITS}
    return found if len(found) == len(first) else {}


def _with_splits(described: dict[str, dict[str, Any]], left_out: list[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """With the splits that folders say where the rows say none; else without the pictures whose row says none."""
    if not any(row.get("split") for row in described.values()):
        splits = _splits(described)
        return {name: row | ({"split": splits[name]} if splits else {}) for name, row in described.items()}
    left_out += [(name, "its row has no split") for name, row in described.items() if not row.get("split")]
    return {name: row for name, row in described.items() if row.get("split")}
