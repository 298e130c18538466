"""List the files of a folder: images, lists, and what is not read."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..image_grid import grids_beside_images
from ..pipelines.image_inputs import HEIF_SUFFIXES, IMAGE_SUFFIXES
from ..storage import is_lfs_pointer
from .celeba import CELEBA_HQ_MAPPING, CELEBA_LISTS
from .contents import Contents, SourceOptions
from .label_files import LABEL_FILES, LIST_SUFFIXES
from .metadata import METADATA

# Images that are not read, but listed as left out: HEIF only without pillow-heif.
UNREAD_SUFFIXES = tuple(suffix for suffix in (*HEIF_SUFFIXES, ".jxl") if suffix not in IMAGE_SUFFIXES)
CACHE_INFO = "latents.json"  # the file that makes a folder a latent cache
# What other programs leave behind: thumbnails, recycle bins, halves of Macintosh files. Names in lower case.
_SYSTEM_NAMES = {"@eadir", "#recycle", "$recycle.bin", "thumbs.db", "desktop.ini", "__macosx"}
_MAX_DEPTH = 100
_POINTER_BYTES = 200  # the pointers of git-lfs have some 130


@dataclass
class Skipped:
    """What is not read of a folder.

    Attributes:
        folders: Folders, with the reason.
        grids: Image grids and films that we wrote beside images.
        excluded: Number of files and folders by the pattern of `--exclude`.
    """

    folders: dict[str, str] = field(default_factory=dict)
    grids: list[str] = field(default_factory=list)
    excluded: Counter[str] = field(default_factory=Counter)

    def describe(self, contents: Contents) -> None:
        """Set in `contents` what is not read."""
        contents.unused |= {f"folder {name}": reason for name, reason in self.folders.items()}
        contents.unused |= dict.fromkeys(self.grids, "an image grid or film of the images beside it")
        contents.excluded = self.excluded


@dataclass
class Files:
    """The files of a folder, by their relative paths in the order of names.

    Attributes:
        sizes: Size of each image in bytes.
        lists: Metadata files, lists and label files.
        texts: Other files that may be lists of the images.
        others: Number of the other files by suffix.
        skipped: What is not read.
        left_out: Images that cannot be read, with the reason.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    lists: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    skipped: Skipped = field(default_factory=Skipped)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def scan(folder: Path, options: SourceOptions) -> Files:
    """List the files below `folder`."""
    files = Files()
    for name, entry in walk(folder, options, files.skipped):
        path = PurePosixPath(name)
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            _add_image(name, entry, files)
        elif entry.name in METADATA + LABEL_FILES or path.stem in (*CELEBA_LISTS, CELEBA_HQ_MAPPING):
            files.lists.append(name)
        elif suffix in UNREAD_SUFFIXES:
            files.left_out.append((printable(name), f"{suffix} is not read: convert it to .jpg or .png"))
        else:
            files.others[suffix or "without a suffix"] += 1
            if suffix in LIST_SUFFIXES:
                files.texts.append(name)
    return files


def _add_image(name: str, entry: os.DirEntry[str], files: Files) -> None:
    """Add an image to `files`, or the reason why it cannot be read."""
    # `encode` fails for names that are not UTF-8, `stat` for links to nothing.
    try:
        name.encode()
        status = entry.stat()
        is_pointer = (
            status.st_size < _POINTER_BYTES and stat.S_ISREG(status.st_mode) and is_lfs_pointer(Path(entry.path))
        )
    except UnicodeEncodeError:
        files.left_out.append((printable(name), "its name is not UTF-8"))
    except OSError as error:
        files.left_out.append((name, error.strerror or str(error)))
    else:
        if is_pointer:
            files.left_out.append((name, "a pointer of git-lfs, not the image: run git lfs pull"))
        elif stat.S_ISREG(status.st_mode):
            files.sizes[name] = status.st_size
        else:
            files.left_out.append((name, "not a regular file"))


def walk(folder: Path, options: SourceOptions, skipped: Skipped) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield all files below `folder` with their relative names, following links and visiting each folder once.

    Hidden files and folders, those of other programs, latent caches (whose image grid is no image of the source), and
    the image grids and films that we write beside images are not visited.

    Args:
        folder: The folder to walk.
        options: `--exclude` of it.
        skipped: Receives the folders that are not read and would be missed, and what is excluded.
    """
    yield from _walk(str(folder), "", set(), options, skipped)


def _walk(
    folder: str, prefix: str, seen: set[tuple[int, int]], options: SourceOptions, skipped: Skipped
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    # By inode, since a link may lead to a folder that contains it.
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:
        skipped.folders[printable(prefix)] = "a link to a folder that is read already"
        return
    seen.add((status.st_dev, status.st_ino))
    try:
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
    except PermissionError as error:
        if not prefix:
            raise
        skipped.folders[printable(prefix)] = error.strerror or "cannot be read"
        return
    if any(entry.name == CACHE_INFO for entry in ordered):
        skipped.folders[printable(prefix) or "."] = "a latent cache"
        return
    ordered = [entry for entry in ordered if not is_system_file(entry.name)]
    if not ordered and prefix:
        skipped.folders[printable(prefix)] = "empty"
    grids = grids_beside_images(Path(folder))
    for entry in ordered:
        pattern = options.excluded_by(prefix + entry.name)
        if pattern is not None:
            skipped.excluded[pattern] += 1
        elif not _is_folder(entry):
            if entry.name in grids:
                skipped.grids.append(printable(prefix + entry.name))
            else:
                yield f"{prefix}{entry.name}", entry
        elif prefix.count("/") >= _MAX_DEPTH:
            skipped.folders[f"{printable(prefix)[:20]}.../"] = f"more than {_MAX_DEPTH} folders deep"
        elif entry.name.startswith("__"):  # as in `datasets`
            skipped.folders[f"{printable(prefix + entry.name)}/"] = "its name begins with __"
        else:
            yield from _walk(entry.path, f"{prefix}{entry.name}/", seen, options, skipped)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Check for a folder or a link to one; a link that leads nowhere, or to itself, is a file that cannot be read."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_system_file(name: str) -> bool:
    """Check for the name of a hidden file or folder, or of one that another program left behind."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def printable(name: str) -> str:
    """Return a file name with the bytes that are not UTF-8 as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
