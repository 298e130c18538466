"""Read folders of images, and the lists and metadata files in them that describe the images.

Supported are CelebA (as Kaggle ships it, with the original .txt lists, or flat), CelebAMask-HQ, folders with a
`metadata.csv`, `metadata.jsonl` or `metadata.parquet` (as `datasets`' imagefolder reads them), the `dataset.json` of
StyleGAN and EDM, ImageNet as Kaggle ships it, Tiny ImageNet, folders whose subfolders are classes or splits, and plain
folders. Images and rows that cannot be used are returned with the reason.

The reasons are part of a source's hash (see `sources.py`): with another wording, caches built earlier from the same
folder would count as caches of another source.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import Dataset, Features, Image

from ..pipelines.image_inputs import HEIF_SUFFIXES, IMAGE_SUFFIXES
from .celeba import CELEBA_HQ_MAPPING, CELEBA_LISTS, celeba_images, read_celeba_lists
from .contents import Column, Contents, SourceOptions, counted, shortened
from .folder_levels import classes_by_folder, splits_by_file_name, splits_by_folder
from .label_files import DATASET_JSON, LABEL_FILES, read_label_files
from .metadata import METADATA, Table, join_tables, read_metadata

# Images that are not read, but listed as left out: HEIF only without pillow-heif.
UNREAD_SUFFIXES = tuple(suffix for suffix in (*HEIF_SUFFIXES, ".jxl") if suffix not in IMAGE_SUFFIXES)
CACHE_INFO = "latents.json"  # the file that makes a folder a latent cache
# What other programs leave behind: thumbnails, recycle bins, halves of Macintosh files. Names in lower case.
_SYSTEM_NAMES = {"@eadir", "#recycle", "$recycle.bin", "thumbs.db", "desktop.ini", "__macosx"}


@dataclass
class Files:
    """The files of a folder, by their relative paths in the order of names.

    Attributes:
        sizes: Size of each image in bytes.
        lists: Metadata files, lists and label files.
        others: Number of the other files by suffix.
        skipped: Folders that are not read, with the reason.
        left_out: Images that cannot be read, with the reason.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    lists: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def read_folder(folder: Path, options: SourceOptions) -> Contents:
    """Read the images of `folder` and its subfolders, without files of the system and hidden ones.

    Raises:
        FileNotFoundError: if there are no images.
        ValueError: if a list cannot be read at all, or the folder can be read in two ways.
    """
    files = scan(folder)
    if not files.sizes:
        first = f"; {len(files.left_out)} left out, {': '.join(files.left_out[0])}" if files.left_out else ""
        first += f"; it holds {counted(files.others)}" if files.others else ""
        raise FileNotFoundError(f"source {folder}: no images in it ({', '.join(IMAGE_SUFFIXES)}){first}")
    contents = Contents("folder of images", left_out=files.left_out)
    contents.unused |= {f"folder {name}": reason for name, reason in files.skipped.items()}
    if files.others:
        contents.unused["files"] = counted(files.others)

    # CelebA's lists take precedence over metadata files, and these over label files and subfolders.
    special = {*METADATA, *LABEL_FILES}
    celeba = [name for name in files.lists if PurePosixPath(name).name not in special]
    if celeba:
        paths = _read_celeba(folder, files, celeba, options, contents)
    else:
        paths = _read_described(folder, files, options, contents)

    if not paths:
        reason = ": ".join(contents.left_out[0]) if contents.left_out else "no image is in a split"
        raise ValueError(f"source {folder}: none of its {len(files.sizes):,} images can be used; first {reason}")

    # Images.
    root = folder.resolve()
    contents.ids = list(paths)
    contents.sizes = [files.sizes[path] for path in paths.values()]
    contents.groups = [str(PurePosixPath(path).parent) for path in paths.values()]
    contents.images = Dataset.from_dict(
        {"image": [{"bytes": None, "path": str(root / path)} for path in paths.values()]},
        features=Features({"image": Image(decode=False)}),
    )
    return contents


def _read_celeba(
    folder: Path, files: Files, lists: list[str], options: SourceOptions, contents: Contents
) -> dict[str, str]:
    """Read CelebA's or CelebA-HQ's lists into `contents`; return the path of each described image by its id."""
    contents.kind = "CelebA's lists"
    images = celeba_images(files.sizes, contents.left_out)
    tables = read_celeba_lists(folder, lists, contents.left_out)
    keys = {image_id: PurePosixPath(image_id).stem for image_id in images}
    described = join_tables(keys, tables, contents.left_out)
    origin = shortened([table.name for table in tables])
    _take_rows(_with_splits(described, options, contents), origin, contents)
    for column in contents.columns.values():
        column.signed = True
    return {image_id: images[image_id] for image_id in contents.ids}


def _read_described(folder: Path, files: Files, options: SourceOptions, contents: Contents) -> dict[str, str]:
    """Read metadata, label files and subfolders into `contents`; return the path of each described image by its id."""
    metadata = [name for name in files.lists if PurePosixPath(name).name in METADATA]
    label_files = [name for name in files.lists if PurePosixPath(name).name in LABEL_FILES]
    names = list(files.sizes)
    if metadata:
        table = read_metadata(folder, metadata, contents.left_out)
        described = join_tables(_keys_in(table, names), [table], contents.left_out)
        _take_rows(_with_splits(described, options, contents), table.name, contents)
        names = contents.ids
    elif options.split_from == "column":
        raise ValueError(f"--split_from column: {folder} has no metadata file, and so no column `split`")

    # Splits by folder or file name, unless a column has them.
    if contents.splits is None:
        splits = splits_by_folder(names, options, contents) or splits_by_file_name(names, options, contents)
        if splits:
            names = _keep_only(splits, names, contents)

    # Classes by label file or folder. Metadata describes the images alone, unless folders are requested too.
    if not metadata or "class" in (options.conditions or []):
        column = _classes(folder, label_files, names, options, contents)
        if column is not None:
            contents.columns["class"] = column
    elif contents.split_origin != "by folder" and len({PurePosixPath(name).parent.name for name in names}) > 1:
        contents.unused["names of folders"] = "metadata describes the images (--conditions ...,class reads them too)"
    lists = sorted({PurePosixPath(name).name for name in metadata or label_files})
    contents.kind += f" with {shortened(lists)}" if lists else ""
    return {name: name for name in names}


def _keep_only(splits: dict[str, str], names: list[str], contents: Contents) -> list[str]:
    """Set the splits of `contents`, keep only the rows that have one, and return their names."""
    kept = [row for row, name in enumerate(names) if name in splits]
    for column in contents.columns.values():
        column.values = [column.values[row] for row in kept]
    contents.splits = [splits[names[row]] for row in kept]
    return [names[row] for row in kept]


def _classes(
    folder: Path, label_files: list[str], names: list[str], options: SourceOptions, contents: Contents
) -> Column | None:
    """Return the class of each image by label files and folders; None if there are no classes."""
    labels = read_label_files(folder, label_files, names)
    if any(PurePosixPath(name).name == DATASET_JSON for name in label_files):
        # Its folders are blocks of images.
        values = [labels.get(name) for name in names]
        return Column(values, origin=DATASET_JSON, declared=True) if any(v is not None for v in values) else None
    column = classes_by_folder(names, contents.split_origin == "by folder", options, contents)
    if column is not None and labels:
        # ImageNet's training images lie in folders of classes; a list gives those of the validation images.
        pairs = zip(names, column.values, strict=True)
        column.values = [labels.get(name) if value is None else value for name, value in pairs]
        column.origin += f" and {shortened(sorted({PurePosixPath(name).name for name in label_files}))}"
    return column


def _keys_in(table: Table, names: list[str]) -> dict[str, str]:
    """Return the key of each image in a table. Names are the same in any Unicode form; an exact match counts first."""
    forms = {unicodedata.normalize("NFC", key): key for key in table.rows}
    return {
        name: name if name in table.rows else forms.get(unicodedata.normalize("NFC", name), name) for name in names
    }


def _take_rows(described: dict[str, dict[str, Any]], origin: str, contents: Contents) -> None:
    """Set ids and columns of `contents` from the values of each image by column."""
    contents.ids = list(described)
    names = dict.fromkeys(name for row in described.values() for name in row)
    for name in names:
        contents.columns[name] = Column([row.get(name) for row in described.values()], origin=origin)


def _with_splits(
    described: dict[str, dict[str, Any]], options: SourceOptions, contents: Contents
) -> dict[str, dict[str, Any]]:
    """Take the column `split` out of the rows into `contents`, leaving out rows without a split if others have one."""
    rows = {name: {k: v for k, v in row.items() if k != "split"} for name, row in described.items()}
    splits = {name: row.get("split") for name, row in described.items()}
    if not any(splits.values()):
        if options.split_from == "column":
            raise ValueError("--split_from column: the metadata has no column `split`")
        return rows
    if options.split_from not in (None, "column"):
        return rows
    # Rather than assigned to a split by guess.
    contents.left_out += [(name, "its row has no split") for name, split in splits.items() if not split]
    contents.splits = [str(split) for split in splits.values() if split]
    contents.split_origin = "by column"
    return {name: row for name, row in rows.items() if splits[name]}


def scan(folder: Path) -> Files:
    """List the files below `folder`."""
    files = Files()
    for name, entry in walk(folder, files.skipped):
        suffix = PurePosixPath(name).suffix.lower()
        if suffix not in IMAGE_SUFFIXES:
            if entry.name in METADATA + LABEL_FILES or PurePosixPath(name).stem in (*CELEBA_LISTS, CELEBA_HQ_MAPPING):
                files.lists.append(name)
            elif suffix in UNREAD_SUFFIXES:
                files.left_out.append((printable(name), f"{suffix} is not read: convert it to .jpg or .png"))
            else:
                files.others[suffix or "without a suffix"] += 1
            continue
        # `encode` fails for names that are not UTF-8, `stat` for links to nothing.
        try:
            name.encode()
            status = entry.stat()
        except UnicodeEncodeError:
            files.left_out.append((printable(name), "its name is not UTF-8"))
        except OSError as error:
            files.left_out.append((name, error.strerror or str(error)))
        else:
            if stat.S_ISREG(status.st_mode):
                files.sizes[name] = status.st_size
            else:
                files.left_out.append((name, "not a regular file"))
    return files


def walk(folder: Path, skipped: dict[str, str]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield all files below `folder` with their relative names, following links and visiting each folder once.

    Hidden files and folders, those of other programs, and latent caches (whose image grid is no image of the source)
    are not visited.

    Args:
        folder: The folder to walk.
        skipped: Receives the folders that are not read and would be missed, with the reason.
    """
    yield from _walk(str(folder), "", set(), skipped)


def _walk(
    folder: str, prefix: str, seen: set[tuple[int, int]], skipped: dict[str, str]
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    # By inode, since a link may lead to a folder that contains it.
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    try:
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
    except PermissionError as error:
        if not prefix:
            raise
        skipped[printable(prefix)] = error.strerror or "cannot be read"
        return
    if any(entry.name == CACHE_INFO for entry in ordered):
        skipped[printable(prefix) or "."] = "a latent cache"
        return
    for entry in ordered:
        if entry.name.startswith(".") or entry.name.lower() in _SYSTEM_NAMES:
            continue
        if not entry.is_dir():
            yield f"{prefix}{entry.name}", entry
        elif entry.name.startswith("__"):  # as in `datasets`
            skipped[f"{printable(prefix + entry.name)}/"] = "its name begins with __"
        else:
            yield from _walk(entry.path, f"{prefix}{entry.name}/", seen, skipped)


def printable(name: str) -> str:
    """Return a file name with the bytes that are not UTF-8 as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
