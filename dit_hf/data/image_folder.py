"""Read folders of images, and the lists and metadata files in them that describe the images.

Supported are CelebA (as Kaggle ships it, with the original .txt lists, or flat), CelebAMask-HQ, folders with a
`metadata.csv`, `metadata.jsonl` or `metadata.parquet` (as `datasets`' imagefolder reads them), folders whose
subfolders are classes or splits, and plain folders. Images and rows that cannot be used are returned with the reason.

The reasons are part of a source's hash (see `sources.py`): with another wording, caches built earlier from the same
folder would count as caches of another source.
"""

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
UNREAD_EXTENSIONS = (".heic", ".heif", ".jp2", ".jxl")  # images that are not read, but listed as left out
CACHE_INFO = "latents.json"  # the file that makes a folder a latent cache


@dataclass
class Folder:
    """Images of a folder in the order of their names.

    Attributes:
        paths: File of each image, relative to the folder, by its id.
        sizes: Size of each image in bytes.
        columns: Values of the lists and metadata by column, one per image.
        left_out: Id (bytes that are not UTF-8 are escaped) and reason of each image or row that cannot be used.
    """

    paths: dict[str, str] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def read_folder(folder: Path) -> Folder:
    """Find the images of `folder` and its subfolders, skipping names that begin with `.` or `__`.

    Raises:
        ValueError: if a list cannot be read at all.
    """
    result = Folder()
    sizes, lists = _scan(folder, result.left_out)

    # Columns: CelebA's lists take precedence over metadata files, and these over subfolders.
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

    # Images that are described; the others are in `left_out`.
    result.paths = {image_id: paths[image_id] for image_id in described}
    result.sizes = [sizes[path] for path in result.paths.values()]
    names = dict.fromkeys(name for row in described.values() for name in row)
    result.columns = {name: [row.get(name) for row in described.values()] for name in names}
    return result


def _scan(folder: Path, left_out: list[tuple[str, str]]) -> tuple[dict[str, int], list[str]]:
    """Return the size of each image by its relative path, and the paths of the lists, both in the order of names."""
    sizes: dict[str, int] = {}
    lists: list[str] = []
    metadata_stems = (*CELEBA_LISTS, CELEBA_HQ_MAPPING)
    for name, entry in walk(str(folder), "", set()):
        suffix = PurePosixPath(name).suffix.lower()
        if suffix not in EXTENSIONS:
            if entry.name in METADATA or PurePosixPath(name).stem in metadata_stems:
                lists.append(name)
            elif suffix in UNREAD_EXTENSIONS:
                left_out.append((printable(name), f"{suffix} is not read: convert it to .jpg or .png"))
            continue
        # `encode` fails for names that are not UTF-8, `stat` for links to nothing.
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
    """Yield all files below `folder` with their relative names, following links and visiting each folder once.

    Latent caches are skipped: their image grid is not an image of the source.

    Args:
        folder: The folder to walk.
        prefix: Relative path of `folder`, which ends with a slash unless it is empty.
        seen: Device and inode of the folders that were visited.
    """
    # By inode, since a link may lead to a folder that contains it.
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
    """Return a file name with the bytes that are not UTF-8 as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _describe_by_subfolder(names: list[str]) -> dict[str, dict[str, Any]]:
    """Return split (the first folder) and class (the last folder) of each image, if the folders can be read so.

    First folders are splits if all of them are names of splits. Last folders are classes if there are at least two and
    all images are equally deep.
    """
    parents = [PurePosixPath(name).parts[:-1] for name in names]
    splits = splits_by_folder(names)
    if splits:
        parents = [parts[1:] for parts in parents]
    classes = [parts[-1] if parts else None for parts in parents]
    has_classes = len(set(classes)) > 1 and len({len(parts) for parts in parents}) == 1
    if has_classes and all(str(label).isdigit() and str(label).endswith("000") for label in classes):
        has_classes = False  # FFHQ's folders 00000, 01000, ... of a thousand images each
    return {
        name: ({"split": splits[name]} if splits else {}) | ({"class": label} if has_classes else {})
        for name, label in zip(names, classes, strict=True)
    }
