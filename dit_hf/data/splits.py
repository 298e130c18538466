"""Assign images to training, validation and test splits: by folder, by column, or by the hash of the id."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

# Names of splits in sources, in lower case, as the split that they mean.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def splits_by_folder(names: Iterable[str]) -> dict[str, str]:
    """Return the split of each image by its first folder, or nothing unless every first folder names a split."""
    folders = {name: PurePosixPath(name).parts[0].lower() for name in names}
    splits = {name: SPLITS[folder] for name, folder in folders.items() if folder in SPLITS}
    return splits if len(splits) == len(folders) else {}


def with_splits(described: dict[str, dict[str, Any]], left_out: list[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Complete the `split` of rows of metadata, by id of the image.

    If no row has a split, the folders decide. If some rows have one, images without one are left out rather than
    assigned to a split by guess.
    """
    if not any(row.get("split") for row in described.values()):
        splits = splits_by_folder(described)
        return {name: row | ({"split": splits[name]} if splits else {}) for name, row in described.items()}
    left_out += [(name, "its row has no split") for name, row in described.items() if not row.get("split")]
    return {name: row for name, row in described.items() if row.get("split")}


def is_held_out(image_id: str, share: float = 0.02) -> bool:
    """Check whether an image belongs to the `share` that is held out for validation, by the hash of its id alone."""
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8]) < share * 2**64
