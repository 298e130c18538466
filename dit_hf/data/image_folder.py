"""Read folders of images, and the lists and metadata files in them that describe the images.

Supported are CelebA (as Kaggle ships it, with the original .txt lists, or flat), CelebAMask-HQ, folders with a
`metadata.csv`, `metadata.jsonl` or `metadata.parquet` (as `datasets`' imagefolder reads them), the `dataset.json` of
StyleGAN and EDM, ImageNet as Kaggle ships it, Tiny ImageNet, folders whose subfolders are classes or splits, and plain
folders. Images and rows that cannot be used are returned with the reason.

The reasons are part of a source's hash (see `sources.py`): with another wording, caches built earlier from the same
folder would count as caches of another source.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import Dataset, Features, Image

from ..pipelines.image_inputs import IMAGE_SUFFIXES
from .celeba import celeba_images, read_celeba_lists
from .contents import Column, Contents, SourceOptions, counted, image_count, shortened
from .files import Files, scan
from .folder_levels import (
    classes_by_folder,
    note_other_splits,
    reads_folders,
    splits_by_file_name,
    splits_by_folder,
)
from .label_files import DATASET_JSON, LABEL_FILES, read_label_files, unread_lists
from .masks import check_masks
from .metadata import METADATA, Table, join_tables, read_metadata

# Suffixes of archives, which are not read in a folder of images.
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


def read_folder(folder: Path, options: SourceOptions) -> Contents:
    """Read the images of `folder` and its subfolders, without files of the system and hidden ones.

    Raises:
        FileNotFoundError: if there are no images.
        ValueError: if a list cannot be read at all, or the folder can be read in two ways.
    """
    files = scan(folder, options)
    if not files.sizes:
        raise FileNotFoundError(f"source {folder}: no images in it{_what_else(files)}")
    contents = Contents("folder of images", left_out=files.left_out)
    files.skipped.describe(contents)
    if files.others:
        contents.unused["files"] = counted(files.others)
    for name, reason in unread_lists(folder, files.texts, files.sizes).items():
        contents.unused[name] = reason
    _note_doubles(files, contents)

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


def _what_else(files: Files) -> str:
    """Return what a folder without images holds, and the way out."""
    if files.left_out:
        return f"; {len(files.left_out):,} left out, first {': '.join(files.left_out[0])}"
    archives = {suffix: count for suffix, count in files.others.items() if suffix in _ARCHIVES}
    if archives:
        return f"; it holds {counted(archives)}: unpack them"
    holds = f"; it holds {counted(files.others)}" if files.others else ""
    return f" ({shortened([*IMAGE_SUFFIXES], 6)}){holds}"


def _note_doubles(files: Files, contents: Contents) -> None:
    """Name images of one name that differ in their suffix, which may be one image stored twice."""
    stems: dict[str, str] = {}
    doubles = [(first, n) for n in files.sizes if (first := stems.setdefault(n.rpartition(".")[0], n)) != n]
    if doubles:
        first, second = doubles[0]
        contents.choices.append(
            f"{image_count(len(doubles))} twice by name, read too: {second} beside {first} "
            f"(--exclude '*{PurePosixPath(second).suffix}')"
        )


def _read_celeba(
    folder: Path, files: Files, lists: list[str], options: SourceOptions, contents: Contents
) -> dict[str, str]:
    """Read CelebA's or CelebA-HQ's lists into `contents`; return the path of each described image by its id."""
    contents.kind = "CelebA's lists"
    known = len(contents.left_out)
    images = celeba_images(files.sizes, contents.left_out)
    beside = len(files.sizes) - len(images) - (len(contents.left_out) - known)
    if beside:
        contents.unused[image_count(beside)] = "in other folders than that of the aligned faces"
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
    check_masks(str(folder), names, options)
    if metadata:
        table = read_metadata(folder, metadata, contents.left_out)
        described = join_tables(_keys_in(table, names), [table], contents.left_out)
        _take_rows(_with_splits(described, options, contents), table.name, contents)
        names = contents.ids
        note_other_splits(names, contents)
    elif options.split_from == "column":
        raise ValueError(f"--split_from column: {folder} has no metadata file, and so no column `split`")

    # Splits by folder or file name, unless a column has them.
    if contents.splits is None:
        splits = splits_by_folder(names, options, contents) or splits_by_file_name(names, options, contents)
        if splits:
            names = [names[row] for row in contents.keep_splits(splits)]

    # Classes by label file or folder. Metadata describes the images alone, unless folders are requested too.
    if not metadata or reads_folders(options):
        contents.columns |= _classes(folder, label_files, names, options, contents)
    elif contents.split_origin != "by folder" and len({PurePosixPath(name).parent.name for name in names}) > 1:
        contents.unused["names of folders"] = "metadata describes the images (--conditions ...,class reads them too)"
    lists = sorted({PurePosixPath(name).name for name in metadata or label_files})
    contents.kind += f" with {shortened(lists)}" if lists else ""
    return {name: name for name in names}


def _classes(
    folder: Path, label_files: list[str], names: list[str], options: SourceOptions, contents: Contents
) -> dict[str, Column]:
    """Return the class of each image by label files and folders; {} if there are no classes."""
    labels = read_label_files(folder, label_files, names)
    if any(PurePosixPath(name).name == DATASET_JSON for name in label_files):
        # Its folders are blocks of images.
        values = [labels.get(name) for name in names]
        has_labels = (options.conditions is None or "class" in options.conditions) and any(
            value is not None for value in values
        )
        return {"class": Column(values, origin=DATASET_JSON, declared=True)} if has_labels else {}
    columns = classes_by_folder(names, options, contents)
    if "class" in columns and labels:
        column = columns["class"]
        # ImageNet's training images lie in folders of classes; a list gives those of the validation images.
        pairs = zip(names, column.values, strict=True)
        column.values = [labels.get(name) if value is None else value for name, value in pairs]
        column.origin += f" and {shortened(sorted({PurePosixPath(name).name for name in label_files}))}"
    return columns


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
