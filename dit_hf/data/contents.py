"""What the readers of sources take and return: options of the user, and the contents of a source before any choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

RESERVED = ("id", "image", "split")  # columns of a source that are not conditions
SplitFrom = Literal["folders", "files", "column", "none"]
Missing = Literal["null", "leave_out"]


def condition_names(columns: Iterable[str]) -> list[str]:
    """Return the columns of a source's rows that are conditions."""
    return [name for name in columns if name not in RESERVED]


@dataclass(frozen=True)
class SourceOptions:
    """How a source is to be read, where it can be read in several ways. None leaves the choice to the source.

    Attributes:
        dataset_config_name: The configuration of a dataset on the Hub.
        split: Read only this split: `train`, `validation` or `test`.
        num_images: Take this many images of the training split (or of `split`).
        seed: Seed of the avatars and of the choice of `num_images`.
        avatar_size: Side of the avatars in pixels.
        image_column: The column of images; in a webdataset the suffix.
        conditions: Columns to read as conditions; `class` is the folder's name; an empty list is none.
        exclude: Patterns of the files and folders that are not read; None excludes nothing, but refuses images that
            look like masks of others.
        split_from: Where splits come from.
        missing: What becomes of a row without a value of a condition: null, or the row is left out.
        allow_partial: Read the source although a requested condition is missing in one of its splits.
    """

    dataset_config_name: str | None = None
    split: str | None = None
    num_images: int | None = None
    seed: int = 0
    avatar_size: int = 64
    image_column: str | None = None
    conditions: list[str] | None = None
    exclude: list[str] | None = None
    split_from: SplitFrom | None = None
    missing: Missing = "null"
    allow_partial: bool = False

    def excluded_by(self, path: str) -> str | None:
        """Return the pattern that excludes a file or folder: it matches a part of its path, or its path up to one."""
        if not self.exclude:
            return None
        parts = path.split("/")
        names = [*parts, *("/".join(parts[: i + 1]) for i in range(1, len(parts)))]
        return next((p for p in self.exclude if any(fnmatchcase(name, p) for name in names)), None)


@dataclass
class Column:
    """Column that may become a condition.

    Attributes:
        values: One value per row, as an Arrow array if all are of one type; None or null is missing.
        labels: Names of the values, if the source declares the column as classes; values are then ids.
        origin: Where it comes from, for the plan, such as `folder` or `metadata.csv`.
        signed: Whether -1 means no, as in CelebA's lists.
        declared: Whether the format itself says that whole numbers are classes.
    """

    values: list[Any] | pa.Array
    labels: list[str] | None = None
    origin: str = ""
    signed: bool = False
    declared: bool = False

    def encode(self) -> tuple[list[Any], np.ndarray]:
        """Return the different values, and the position of each row's value among them, int64 [rows]; -1 is null.

        Raises:
            TypeError: for lists and structures.
        """
        if isinstance(self.values, pa.Array):
            try:
                encoded = self.values.dictionary_encode()
            except pa.ArrowNotImplementedError as error:
                raise TypeError(f"values of type {self.values.type}") from error
            return encoded.dictionary.to_pylist(), pc.fill_null(encoded.indices, -1).to_numpy().astype(np.int64)
        positions: dict[Any, int] = {}
        rows = [positions.setdefault(value, len(positions)) for value in self.values]
        return list(positions), np.array(rows, np.int64)


@dataclass
class Contents:
    """Contents of a source: one entry per image in each list.

    Attributes:
        kind: The kind of source, for the plan.
        ids: Id of each image.
        images: One column `image`, not decoded.
        sizes: Size of each stored image in bytes.
        columns: Columns that may become conditions, by name.
        splits: Split of each image; None if the source has no splits.
        split_origin: Where the splits come from, for the plan.
        groups: The folder or shard of each image, over which `num_images` is spread.
        left_out: Id and reason of each image or row that cannot be used.
        unused: What is not read, such as `column caption` or `folder extra/`, and the reason.
        excluded: Number of files and folders by the pattern of `--exclude` that they match.
        choices: Sentences about what was ambiguous: the reading, and the option that changes it.
        image_column: The column of images; None for folders.
        addressed: Whether paths of images are addresses inside shards, see `stored_images`.
    """

    kind: str
    ids: list[str] = field(default_factory=list)
    images: Dataset | None = None
    sizes: list[int] = field(default_factory=list)
    columns: dict[str, Column] = field(default_factory=dict)
    splits: list[str] | None = None
    split_origin: str = ""
    groups: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)
    excluded: Counter[str] = field(default_factory=Counter)
    choices: list[str] = field(default_factory=list)
    image_column: str | None = None
    addressed: bool = False

    def keep(self, kept: Sequence[int]) -> None:
        """Keep only these rows of the lists that are set already."""

        def select(values: list[Any]) -> list[Any]:
            return [values[row] for row in kept] if values else []

        self.ids, self.sizes, self.groups = select(self.ids), select(self.sizes), select(self.groups)
        self.splits = None if self.splits is None else select(self.splits)
        self.images = None if self.images is None else self.images.select(kept)
        for column in self.columns.values():
            if isinstance(column.values, pa.Array):
                column.values = column.values.take(pa.array(kept, pa.int64()))
            else:
                column.values = select(column.values)

    def forget_rows(self) -> None:
        """Forget everything of which there is one entry per image."""
        self.keep([])
        self.images = None

    def keep_splits(self, splits: Sequence[str | None]) -> list[int]:
        """Set the split of each row and keep only the rows that have one; return their numbers."""
        kept = [row for row, split in enumerate(splits) if split is not None]
        self.splits = None
        self.keep(kept)
        self.splits = [split for split in splits if split is not None]
        return kept


def parse_conditions(given: str | list[str] | None) -> list[str] | None:
    """Return `--conditions` as a list: `none` is no condition, `Smiling,Male` are two, None is every condition.

    Raises:
        ValueError: for an empty name or a name given twice.
    """
    return _parse_names("--conditions", given)


def parse_exclude(given: str | list[str] | None) -> list[str] | None:
    """Return `--exclude` as a list of patterns: `none` is no pattern, `masks,*_depth.png` are two.

    Raises:
        ValueError: for an empty pattern or a pattern given twice.
    """
    names = _parse_names("--exclude", given)
    return None if names is None else [name.removeprefix("./").rstrip("/") for name in names]


def _parse_names(option: str, given: str | list[str] | None) -> list[str] | None:
    if given is None:
        return None
    names = [name.strip() for name in given.split(",")] if isinstance(given, str) else list(given)
    if names == ["none"]:
        return []
    if len(set(names)) < len(names) or not all(names):
        raise ValueError(f"{option} {given}: expected different names, separated by commas, or none")
    return names


def shortened(names: list[str], count: int = 4) -> str:
    """Return names as one text, of which only the first `count` are named."""
    rest = f", … ({len(names):,} in all)" if len(names) > count else ""
    return ", ".join(names[:count]) + rest


def counted(numbers: Mapping[str, int]) -> str:
    """Return numbers by name as one text in the order of the names, such as `2 .txt, 1 without a suffix`."""
    return ", ".join(f"{number:,} {name}" for name, number in sorted(numbers.items()))


def image_count(count: int) -> str:
    """Return a number of images as text."""
    return f"{count:,} image{'' if count == 1 else 's'}"


def short_names(names: list[str]) -> list[str]:
    """Return names without the structs around them; of several with one short name, each stays whole."""
    short = [name.rpartition(".")[2] for name in names]
    counts = Counter(short)
    return [own if counts[own] == 1 else name for name, own in zip(names, short, strict=True)]
