"""Assign images to training, validation and test splits: by name of a folder, file or split, or by hash of the id."""

from __future__ import annotations

import hashlib
import re

# Names of splits in sources, in lower case, as the split that they mean: those of `datasets`.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# `datasets` finds the names of splits between these characters: train2017, dev_seen, part-2-test. The last
# alternative finds them in trainA and TestSet too.
_SEPARATORS = re.compile(r"[-._ 0-9]+|(?<=[a-z])(?=[A-Z])")
# What may stand beside the split in a folder's name. Other words make it a class: freight_train, crash_test.
_WORDS_OF_FOLDERS = {"", "set", "split", "data", "images", "image", "imgs", "img"}


def split_named(name: str) -> str | None:
    """Return the split that a name of a folder, file or split names; None if it names none, or two."""
    splits = {SPLITS[word] for word in _words(name) if word in SPLITS}
    return splits.pop() if len(splits) == 1 else None


def split_of_folder(name: str) -> str | None:
    """Return the split that a folder is, by its name alone: `train2017`, `test_set`, but not `freight_train`."""
    others = {word for word in _words(name) if word not in SPLITS}
    return split_named(name) if others <= _WORDS_OF_FOLDERS else None


def without_split(name: str) -> str:
    """Return the name of a folder without the words that name a split: `A` of `trainA`, `` of `train2017`."""
    others = [word for word in _SEPARATORS.split(name) if word.lower() not in SPLITS]
    return "" if {word.lower() for word in others} <= _WORDS_OF_FOLDERS else "_".join(filter(None, others))


def _words(name: str) -> list[str]:
    """Return the words of a name in lower case."""
    return [word.lower() for word in _SEPARATORS.split(name)]


def is_held_out(image_id: str, share: float = 0.02) -> bool:
    """Check whether an image belongs to the `share` that is held out for validation, by the hash of its id alone."""
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8]) < share * 2**64
