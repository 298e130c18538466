"""Folders of images: their files, and the lists beside them that say what the images show.

Known are CelebA (as Kaggle ships it, with the original .txt lists, or flat), CelebAMask-HQ, folders with a
`metadata.csv`, `metadata.jsonl` or `metadata.parquet` (as `datasets`' imagefolder reads them), folders whose
subfolders are classes or splits, and plain ones. Whatever cannot be used is returned with the reason."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .celeba import CELEBA_HQ_MAPPING, CELEBA_LISTS, celeba_images, read_celeba_lists
from .metadata import METADATA, join_tables, read_metadata
from .splits import splits_by_folder, with_splits

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
UNREAD_EXTENSIONS = (".heic", ".heif", ".jp2", ".jxl")  # which are not read, but listed as left out
CACHE_INFO = "latents.json"  # by which a folder is a latent cache


@dataclass
class Folder:
    """The images of a folder in the order of their names.

    Attributes:
        paths: The file of each image by its id, relative to the folder.
        sizes: Its size in bytes.
        columns: What the lists say of each image, by name of the column; one value an image, in order.
        left_out: Ids (escaped where they are no UTF-8) that cannot be used, with the reason.
    """

    paths: dict[str, str] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def read_folder(folder: Path) -> Folder:
    """Find the images of `folder` and its subfolders (hidden files and names with `__` in front are passed over).

    Raises:
        ValueError: for a list that cannot be read at all.
    """
    result = Folder()
    sizes, lists = _scan(folder, result.left_out)
    celeba = [name for name in lists if PurePosixPath(name).name not in METADATA]
    if celeba:
        paths = celeba_images(sizes, result.left_out)
        tables = read_celeba_lists(folder, celeba, result.left_out)
        keys = {image_id: PurePosixPath(image_id).stem for image_id in paths}
        described = join_tables(keys, tables, result.left_out)
    else:
        paths = {name: name for name in sizes}
        metadata = [name for name in lists if PurePosixPath(name).name in METADATA]
        if metadata:
            tables = [read_metadata(folder, metadata, result.left_out)]
            described = with_splits(join_tables(paths, tables, result.left_out), result.left_out)
        else:
            described = _describe_by_subfolder(list(paths))
    result.paths = {image_id: paths[image_id] for image_id in described}
    result.sizes = [sizes[path] for path in result.paths.values()]
    names = dict.fromkeys(name for row in described.values() for name in row)
    result.columns = {name: [row.get(name) for row in described.values()] for name in names}
    return result


def _scan(folder: Path, left_out: list[tuple[str, str]]) -> tuple[dict[str, int], list[str]]:
    """Sizes of the images by relative path, and the lists, in the order of their names."""
    sizes: dict[str, int] = {}
    lists: list[str] = []
    for name, entry in walk(str(folder), "", set()):
        suffix = PurePosixPath(name).suffix.lower()
        if suffix not in EXTENSIONS:
            if entry.name in METADATA or PurePosixPath(name).stem in (*CELEBA_LISTS, CELEBA_HQ_MAPPING):
                lists.append(name)
            elif suffix in UNREAD_EXTENSIONS:
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

    A latent cache among them is passed over: its image grid is no image of the source.
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


def _describe_by_subfolder(names: list[str]) -> dict[str, dict[str, Any]]:
    """Split by the first folder, class by the last, where all images agree that these are what folders mean here."""
    parents = [PurePosixPath(name).parts[:-1] for name in names]
    splits = splits_by_folder(names)
    if splits:
        parents = [parts[1:] for parts in parents]
    classes = [parts[-1] if parts else None for parts in parents]
    has_classes = len(set(classes)) > 1 and len({len(parts) for parts in parents}) == 1
    if has_classes and all(str(label).isdigit() and str(label).endswith("000") for label in classes):
        has_classes = False  # a thousand images in each, as FFHQ comes
    return {
        name: ({"split": splits[name]} if splits else {}) | ({"class": label} if has_classes else {})
        for name, label in zip(names, classes, strict=True)
    }
