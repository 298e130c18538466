"""Training, validation and test splits: by folders, by columns, and by the hash of an id."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def splits_by_folder(names: Iterable[str]) -> dict[str, str]:
    """The split of each image by its first folder; nothing unless all are in the folder of one."""
    first = {name: PurePosixPath(name).parts[0].lower() for name in names}
    found = {name: SPLITS[folder] for name, folder in first.items() if folder in SPLITS}
    return found if len(found) == len(first) else {}


def with_splits(described: dict[str, dict[str, Any]], left_out: list[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """With the splits that folders say where the rows say none; else without the images whose row says none."""
    if not any(row.get("split") for row in described.values()):
        splits = splits_by_folder(described)
        return {name: row | ({"split": splits[name]} if splits else {}) for name, row in described.items()}
    left_out += [(name, "its row has no split") for name, row in described.items() if not row.get("split")]
    return {name: row for name, row in described.items() if row.get("split")}


def is_held_out(image_id: str, share: float = 0.02) -> bool:
    """Whether an image is held out for validation: decided by the hash of its id alone, so by nothing else."""
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8]) < share * 2**64
