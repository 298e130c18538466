"""What the folders above an image mean: a split, a class, or nothing.

As in `datasets`' imagefolder, a folder named like a split is one, and the last folder is the class. Where that would
lose images or invent classes, the reading is printed, or refused with both readings and the option that chooses.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from pathlib import PurePosixPath

from .contents import Column, Contents, SourceOptions, shortened
from .splits import split_named, split_of_folder

_BLOCK = 1000  # images in each folder that the tools of FFHQ and StyleGAN write


def splits_by_folder(names: list[str], options: SourceOptions, contents: Contents) -> dict[str, str]:
    """Return the split of each image that is in a folder named like a split; {} if the source has no such folders.

    Images beside such folders are not read, which `contents.unused` says.

    Raises:
        ValueError: if only one folder among others is named like a split, and no option says what it is.
    """
    if options.split_from not in (None, "folders"):
        return {}
    parents = {name: PurePosixPath(name).parts[:-1] for name in names}
    for level in range(max(map(len, parents.values()), default=0)):
        # The first level at which any folder is named like a split.
        folders = {name: parts[level] for name, parts in parents.items() if len(parts) > level}
        splits = {name: split for name, folder in folders.items() if (split := split_of_folder(folder))}
        if not splits:
            continue
        others = Counter(f"{parents[name][level]}/" if name in folders else "" for name in names if name not in splits)
        if others and len(set(splits.values())) == 1 and options.split_from is None:
            named = shortened(sorted({f"{folders[name]}/" for name in splits}))
            beside = shortened(sorted(folder or "images in no such folder" for folder in others))
            raise ValueError(
                f"{named} is named like a split, {beside} beside it is not: --split_from folders leaves the latter "
                "out, --split_from none reads all as training images"
            )
        for folder, count in sorted(others.items()):
            what = f"folder {folder}" if folder else "images beside the folders of the splits"
            contents.unused[what] = f"names no split; {count:,} images (--split_from none reads them too)"
        contents.split_origin = "by folder"
        return splits
    if options.split_from == "folders":
        raise ValueError("--split_from folders: no folder is named like a split (train, validation, test)")
    return {}


def splits_by_file_name(names: list[str], options: SourceOptions, contents: Contents) -> dict[str, str]:
    """Return the split that the name of each file names, as in `test_001.png`; {} unless all files name one.

    With `split_from="files"` files whose name is not like a split's are not read.
    """
    if options.split_from not in (None, "files"):
        return {}
    splits = {name: split for name in names if (split := split_named(PurePosixPath(name).stem))}
    others = [name for name in names if name not in splits]
    if options.split_from == "files":
        if not splits:
            raise ValueError("--split_from files: no file is named like a split (train, validation, test)")
        if others:
            contents.unused["files whose name is no split's"] = f"{len(others):,} images, first {others[0]}"
    elif others or len(set(splits.values())) < 2:
        return {}
    contents.split_origin = "by file name"
    return splits


def classes_by_folder(names: list[str], has_splits: bool, options: SourceOptions, contents: Contents) -> Column | None:
    """Return the class of each image, the last folder above it; None if the folders are no classes.

    Folders of splits, folders that all images share, and a last folder that is the same everywhere (`images/` in Tiny
    ImageNet) are no classes.

    Raises:
        ValueError: if images lie at different depths, and no option says what the folders are.
    """
    if not options.takes("class"):
        return None
    requested = options.conditions is not None
    parents = [list(PurePosixPath(name).parts[:-1]) for name in names]
    if has_splits:
        parents = [_without_split(parts) for parts in parents]
    _remove_shared_folders(parents)

    # In one Unicode form: the same name may be spelled in two.
    classes = [unicodedata.normalize("NFC", parts[-1]) if parts else None for parts in parents]
    named = sorted({folder for folder in classes if folder is not None})
    if len(named) < 2 and not requested:
        if named and None in classes:
            contents.choices.append(f"one folder, {named[0]}/, is no class (--conditions class reads it as one)")
        return None
    depths = sorted({len(parts) for parts in parents if parts})
    if len(depths) > 1 and not requested:
        raise ValueError(
            f"images lie {' and '.join(map(str, depths))} folders deep: --conditions class takes the last folder as "
            "class, --conditions none reads the images without classes"
        )
    if _are_blocks(classes) and not requested:
        contents.choices.append(
            f"folders {named[0]} to {named[-1]} are blocks of images, no classes (--conditions class reads "
            "them as classes)"
        )
        return None
    return Column(list(classes), origin="folder", declared=True) if named else None


def _without_split(parts: list[str]) -> list[str]:
    """Remove the first folder that is named like a split."""
    level = next((i for i, folder in enumerate(parts) if split_of_folder(folder)), None)
    return parts if level is None else parts[:level] + parts[level + 1 :]


def _remove_shared_folders(parents: list[list[str]]) -> None:
    """Remove folders that say nothing, because all images lie in them, from both ends of each path, in place."""
    for end in (0, -1):
        while parents and all(parents) and len({parts[end] for parts in parents}) == 1:
            for parts in parents:
                parts.pop(end)
    # A last folder that only images in deeper folders share, beside images in none: val/images, train/cat/images.
    ends = {parts[-1] for parts in parents if parts}
    if len(ends) == 1 and any(len(parts) > 1 for parts in parents):
        for parts in parents:
            if parts:
                parts.pop()


def _are_blocks(classes: list[str | None]) -> bool:
    """Check for folders of a thousand images each: 00000, 01000, … (FFHQ) or 00000, 00001, … (StyleGAN)."""
    counts = Counter(classes)
    names = sorted(name for name in counts if name is not None)
    if None in counts or not all(name.isdigit() and len(name) >= 5 for name in names):
        return False
    numbers = [int(name) for name in names]
    return all(number % _BLOCK == 0 for number in numbers) or numbers == list(range(len(numbers)))
