"""Find images that belong to other images, such as masks, depth maps and thumbnails, by their folders and names."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PurePosixPath

from .contents import SourceOptions

# As whole names of folders, without what separates their words, and as last words of file names.
_WORDS = (
    *("mask", "masks", "trimap", "trimaps", "matte", "mattes", "seg", "segmap", "segmentation", "segmentations"),
    *("segmentationclass", "segmentationobject", "semantic", "instance", "label", "labels", "labelmap", "labelids"),
    *("annotation", "annotations", "gt", "groundtruth", "depth", "depths", "depthmaps", "normals", "edges", "parsing"),
    *("thumb", "thumbs", "thumbnail", "thumbnails", "preview", "previews"),
)
_SEPARATORS = re.compile(r"[-_. ]+")
_LAST_WORD = re.compile(rf"(?P<stem>.+)(?P<ending>[-_. ](?:{'|'.join(_WORDS)}))", re.IGNORECASE)


def check_masks(source: str, names: list[str], options: SourceOptions) -> None:
    """Refuse images that look like masks of others, unless `--exclude` says which images are read.

    Args:
        source: Name of the source, for the error.
        names: Paths of the images.
        options: How the source is to be read.

    Raises:
        ValueError: naming the folders or files, and the option.
    """
    if options.exclude is not None:
        return
    folders = {folder: _mask_folder(folder) for folder in {name.rpartition("/")[0] for name in names}}
    masks: dict[str, tuple[str, str]] = {}  # pattern that excludes it, and the stem of its image
    images: dict[str, str] = {}
    for name in names:
        stem, folder = PurePosixPath(name).stem, folders[name.rpartition("/")[0]]
        match = _LAST_WORD.fullmatch(stem)
        if folder or match:
            own = match["stem"] if match else stem
            masks[name] = folder or f"*{match['ending'] if match else ''}.*", own
        else:
            images[stem] = name
    paired = {name: images[stem] for name, (_, stem) in masks.items() if stem in images}

    # A folder counts if most of what it holds belongs to other images; a file if it does itself.
    totals, found = Counter(pattern for pattern, _ in masks.values()), Counter(masks[name][0] for name in paired)
    patterns = sorted(pattern for pattern in found if pattern[0] == "*" or 2 * found[pattern] >= totals[pattern])
    if patterns:
        example = next(name for name in paired if masks[name][0] == patterns[0])
        listed = ",".join(patterns)
        raise ValueError(
            f"source {source}: {sum(found[pattern] for pattern in patterns):,} images look like masks, labels or "
            f"thumbnails of others (first {example} of {paired[example]}): --exclude '{listed}' leaves them "
            "out, --exclude none reads all as images"
        )


def _mask_folder(folder: str) -> str:
    """Return the first part of a path that is named like masks; "" if none is."""
    return next((part for part in folder.split("/") if _SEPARATORS.sub("", part).lower() in _WORDS), "")
