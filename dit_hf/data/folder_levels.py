"""What the folders above an image mean: a split, a class, or nothing; in a folder and inside an archive alike.

As in `datasets`' imagefolder, a folder named like a split is one, and the last folder is the class. Where that would
lose images, train on those held out, or invent or merge classes, the reading is printed, or refused with both readings
and the option that chooses.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

from .contents import Column, Contents, SourceOptions, image_count, shortened
from .splits import split_named, split_of_folder, without_split

_BLOCK = 1000  # images in each folder that the tools of FFHQ and StyleGAN write
_BLOCK_NAME = re.compile(r"(fold|part|batch|chunk|shard|block|images?|imgs?|data|set|folder|dir)[-_ .]?[0-9]+", re.I)
_FOLD_NAME = re.compile(r"(cv|fold)[-_ .]?[0-9]+", re.I)
_LEVEL_NAME = re.compile(r"class|folder_[1-9][0-9]*")


def splits_by_folder(names: list[str], options: SourceOptions, contents: Contents) -> list[str | None]:
    """Return the split of each image, that of the folders above it; [] if no folder is named like a split.

    None stands for images beside such folders, which are not read; `contents.unused` names them.

    Raises:
        ValueError: if the folders can be read in two ways, and no option chooses.
    """
    if options.split_from not in (None, "folders"):
        return []
    folders = [name.rpartition("/")[0] for name in names]
    counts = Counter(folders)
    named = {folder: _splits_in(folder) for folder in counts}
    if not any(named.values()):
        named = _loosely_named(counts, options, contents)
    if not any(named.values()):
        if options.split_from == "folders":
            raise ValueError("--split_from folders: no folder is named like a split (train, validation, test)")
        return []
    if options.split_from is None:
        _check_one_split_each(named)

    # A folder of two splits holds no training images.
    splits = {folder: min(found, key=lambda split: split == "train") for folder, found in named.items() if found}
    others = {folder: count for folder, count in counts.items() if folder not in splits}
    if others:
        splits |= _splits_beside(others, splits, options, contents)
    contents.split_origin = "by folder"
    return [splits.get(folder) for folder in folders]


def _splits_in(folder: str) -> list[str]:
    """Return the splits that the parts of a path name, from the inside."""
    return [split for part in reversed(folder.split("/")) if (split := split_of_folder(part))]


def _loosely_named(folders: Iterable[str], options: SourceOptions, contents: Contents) -> dict[str, list[str]]:
    """Return the splits of folders whose names say more than a split, such as trainA; {} if these are no splits.

    Raises:
        ValueError: if they name several splits, and no option says what they are.
    """
    parts = sorted({part for folder in folders for part in folder.split("/") if split_named(part)})
    found = {split_named(part) for part in parts}
    if options.split_from == "folders":
        return {folder: [s for part in reversed(folder.split("/")) if (s := split_named(part))] for folder in folders}
    called = shortened([f"{part}/" for part in parts])
    if len(found) > 1:
        raise ValueError(
            f"{called} name splits beside other words: --split_from folders reads them as splits, --split_from none "
            "reads all as training images"
        )
    if found and found != {"train"}:
        contents.choices.append(f"{called}: no split (--split_from folders reads it as one)")
    return {}


def _check_one_split_each(named: dict[str, list[str]]) -> None:
    """Refuse folders below those of two splits, and folds of a cross-validation, which share their images."""
    for folder, found in named.items():
        if len(set(found)) > 1:
            raise ValueError(
                f"{folder}/ names {' and '.join(reversed(found))}: --split_from folders keeps its images out of "
                "training, --split_from none reads all images of the source as training images"
            )
    folds = sorted({part for folder in named for part in folder.split("/") if _FOLD_NAME.fullmatch(part)})
    if len(folds) > 1:
        raise ValueError(
            f"{shortened([f'{fold}/' for fold in folds])} are folds, each with splits of its own: name one of them as "
            "the source (--split_from folders reads all, although an image may be in several)"
        )


def _splits_beside(
    others: dict[str, int], splits: dict[str, str], options: SourceOptions, contents: Contents
) -> dict[str, str]:
    """Return the split of folders that name none: training if no folder is named like that; {} to leave them out.

    Raises:
        ValueError: if only one split is named, or the training split is not, and no option says what the others are.
    """
    ancestors = {"", *("/".join(f.split("/")[: i + 1]) for f in splits for i in range(f.count("/") + 1))}
    beside: Counter[str] = Counter()
    for folder, count in others.items():
        parts = folder.split("/")
        paths = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        beside[next((f"{path}/" for path in paths if path not in ancestors), "")] += count

    found, trained = set(splits.values()), "train" in splits.values()
    if options.split_from is None and (len(found) == 1 or not trained):
        named = shortened(sorted({f"{part}/" for f in splits for part in f.split("/") if split_named(part)}))
        text = shortened(sorted(folder or "images in no such folder" for folder in beside))
        becomes = "leaves the latter out" if trained else "reads the latter as training images"
        raise ValueError(
            f"{named} is named like a split, {text} beside it is not: --split_from folders {becomes}, --split_from "
            "none reads all as training images"
        )
    if not trained:
        return dict.fromkeys(others, "train")
    for folder, count in sorted(beside.items()):
        what = f"folder {folder} ({image_count(count)})" if folder else f"{image_count(count)} beside the splits"
        contents.unused[what] = "names no split (--split_from none reads them too)"
    return {}


def note_other_splits(names: list[str], contents: Contents) -> None:
    """Name images whose folder names another split than the column that counts."""
    found = {folder: _splits_in(folder) for folder in {name.rpartition("/")[0] for name in names}}
    pairs = zip(names, contents.splits or [], strict=contents.splits is not None)
    others = [name for name, split in pairs if (inside := found[name.rpartition("/")[0]]) and inside[0] != split]
    if others:
        contents.choices.append(
            f"the column split counts for {image_count(len(others))} in folders of another split, first {others[0]} "
            "(--split_from folders)"
        )


def splits_by_file_name(names: list[str], options: SourceOptions, contents: Contents) -> list[str | None]:
    """Return the split that the name of each file names, as in `test_001.png`; [] unless all files name one.

    With `split_from="files"` files whose name is not like a split's are not read, which None stands for.
    """
    if options.split_from not in (None, "files"):
        return []
    splits = [split_named(PurePosixPath(name).stem) for name in names]
    others = [name for name, split in zip(names, splits, strict=True) if split is None]
    if options.split_from == "files":
        if len(others) == len(names):
            raise ValueError("--split_from files: no file is named like a split (train, validation, test)")
        if others:
            what = f"{image_count(len(others))} whose names are no split's"
            contents.unused[what] = f"first {others[0]} (--split_from files)"
    elif others or len(set(splits)) < 2:
        held_out = [name for name, split in zip(names, splits, strict=True) if split not in (None, "train")]
        if held_out:
            contents.choices.append(
                f"named like a split, but training images: {image_count(len(held_out))}, first {held_out[0]} "
                "(--split_from files)"
            )
        return []
    contents.split_origin = "by file name"
    return splits


def reads_folders(options: SourceOptions) -> bool:
    """Check whether names of folders are requested: `class`, the last one, or `folder_1`, the first, and so on."""
    return any(_LEVEL_NAME.fullmatch(name) for name in options.conditions or [])


def classes_by_folder(names: list[str], options: SourceOptions, contents: Contents) -> dict[str, Column]:
    """Return the class of each image, the last folder above it; {} if the folders are no classes.

    If conditions are requested, also `folder_1` (the outermost folder) and so on. Folders of splits, folders that all
    images share, and a last folder that is the same everywhere (`images/` in Tiny ImageNet) are no classes.

    Raises:
        ValueError: if images lie at different depths, or folders of one name in several others, and no option says
            what the folders are.
    """
    requested = options.conditions is not None
    if requested and not reads_folders(options):
        return {}
    folders = [unicodedata.normalize("NFC", name.rpartition("/")[0]) for name in names]  # two spellings of one name
    levels = {folder: folder.split("/") if folder else [] for folder in folders}
    _remove_splits(levels, options)
    _remove_shared_folders(list(levels.values()))
    if not requested:
        _remove_blocks(levels, contents)

    named = sorted({parts[-1] for parts in levels.values() if parts})
    if not requested:
        if len(named) < 2:
            if named and not all(levels.values()):
                contents.choices.append(
                    f"one folder, {named[0]}/, is not a class (--conditions class reads it as one)"
                )
            return {}
        _check_levels(levels, contents)
    columns = {"class": [parts[-1] if parts else None for parts in levels.values()]}
    for i in range(max(map(len, levels.values()), default=0) - 1):
        columns[f"folder_{i + 1}"] = [parts[i] if len(parts) > i else None for parts in levels.values()]
    if not named:
        return {}
    wanted = columns if requested else ["class"]
    by_folder = {name: dict(zip(levels, columns[name], strict=True)) for name in wanted}
    return {n: Column([by_folder[n][f] for f in folders], origin="folder", declared=True) for n in wanted}


def _remove_splits(levels: dict[str, list[str]], options: SourceOptions) -> None:
    """Remove folders of splits from each path, in place: those of the name alone, or the words of trainA."""
    found = {split for folder in levels for split in _splits_in(folder)}
    for parts in levels.values():
        if options.split_from not in (None, "folders"):
            # The class may be above: cat/train, cat/test. One name among others is a class: bus, car, train.
            while len(found) > 1 and parts and split_of_folder(parts[-1]):
                parts.pop()
        elif found:
            parts[:] = [part for part in parts if not split_of_folder(part)]
        elif options.split_from == "folders":
            parts[:] = [rest for part in parts if (rest := without_split(part) if split_named(part) else part)]


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


def _remove_blocks(levels: dict[str, list[str]], contents: Contents) -> None:
    """Remove last folders that only divide many images into blocks, in place."""
    while all(levels.values()) and _are_blocks(names := sorted({parts[-1] for parts in levels.values()})):
        contents.choices.append(
            f"{names[0]} to {names[-1]} are blocks of images, no classes (--conditions class takes them as classes)"
        )
        for parts in levels.values():
            parts.pop()


def _are_blocks(names: list[str]) -> bool:
    """Check for folders of a thousand images each, 00000, 01000, … (FFHQ) or 00000, 00001, … (StyleGAN), or part_1."""
    if names and all(_BLOCK_NAME.fullmatch(name) for name in names):
        return True
    if not names or not all(name.isdigit() and len(name) >= 5 for name in names):
        return False
    numbers = [int(name) for name in names]
    return all(number % _BLOCK == 0 for number in numbers) or numbers == list(range(len(numbers)))


def _check_levels(levels: dict[str, list[str]], contents: Contents) -> None:
    """Refuse classes that the last folder alone does not tell apart, and name the folders above it as not used."""
    # The folders above the class; with `--split_from none` those of splits are still there.
    above = [(parts[-1], [p for p in parts[:-1] if not split_of_folder(p)]) for parts in levels.values() if parts]
    depths = sorted({len(parts) + 1 for _, parts in above})
    if len(depths) > 1 and len({len(parts) for parts in levels.values() if parts}) > 1:
        examples = {len(parts): folder for folder, parts in levels.items()}
        raise ValueError(
            f"images lie {' and '.join(map(str, depths))} folders deep: --conditions class takes the last folder as "
            "class, --conditions folder_1 the first, --conditions none reads the images without classes, --exclude "
            f"leaves folders out (such as {examples[min(depths)]}/ and {examples[max(examples)]}/)"
        )
    upper: dict[str, set[str]] = {}
    for name, parts in above:
        upper.setdefault(name, set()).add("/".join(part for part in parts if not _BLOCK_NAME.fullmatch(part)))
    for name, paths in sorted(upper.items()):
        if len(paths) > 1:
            raise ValueError(
                f"folders called {name} lie in {shortened(sorted(f'{path}/' for path in paths))}: --conditions class "
                "makes one class of them, --conditions folder_1 takes the first folder as class, folder_1,class "
                "both, --conditions none reads the images without classes, --exclude leaves folders out"
            )
    tops = sorted({parts[0] for _, parts in above if parts})
    if tops:
        what = f"folders {shortened([f'{top}/' for top in tops])}"
        contents.unused[what] = "the last folder is the class (--conditions folder_1 takes the first)"
