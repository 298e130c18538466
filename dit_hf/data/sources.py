"""Open any source of images as rows: `id`, undecoded `image`, `split` if it has splits, one column per condition."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets

from ..devices import available_cpus
from .avatars import open_avatars
from .conditions import infer_condition
from .contents import RESERVED, Column, Contents, SourceOptions, condition_names, shortened
from .hf_dataset import holds_dataset, read_hf_dataset
from .image_folder import read_folder
from .plan import Plan
from .splits import SPLITS, split_named, split_of_folder

AVATARS = "avatars"
DEFAULT_NUM_AVATARS = 8000
DEFAULT_AVATAR_SIZE = 64
MAX_LEFT_OUT = 0.01  # larger shares of unusable images are an error
_SIZE, _GROUP = "__size__", "__group__"


@dataclass(frozen=True)
class Source:
    """Opened source of images.

    Attributes:
        name: Name for messages and cards: `avatars`, the folder's name or the Hub id, never a path of this machine.
        rows: `id`, `image` (not decoded), `split` if the source has splits, and the conditions: int8 (1 is yes) or
            `ClassLabel`; null where an image has no value.
        left_out: Id and reason of each image or row that cannot be used, of the requested split if its split is known.
        total: Number of images of the split, left out or not, whatever `num_images`.
        sha256: Hash of ids, sizes of the images, splits, conditions and `left_out`; equal hashes mean equal sources.
        plan: What was understood of the source.
    """

    name: str
    rows: Dataset
    left_out: list[tuple[str, str]]
    total: int
    sha256: str
    plan: Plan


def open_source(source: str, options: SourceOptions | None = None) -> Source:
    """Open `source` without decoding its images.

    Args:
        source: See [`dit_hf.open_images`].
        options: How it is to be read.

    Raises:
        FileNotFoundError: if the source does not exist or holds no image.
        ValueError: for options that do not fit the source, lists that cannot be read, or a source that can be read in
            two ways.
    """
    options = options or SourceOptions()
    _check(source, options)

    # The whole source.
    path = Path(source)
    if source == AVATARS:
        _check_no_dataset(source, options)
        contents = _read_avatars(options)
    elif path.is_dir() and not holds_dataset(path, options):
        _check_no_dataset(source, options)
        contents = read_folder(path, options)
    else:
        contents = read_hf_dataset(source, options)
    for pattern in options.exclude or []:
        if not contents.excluded[pattern]:
            raise ValueError(f"--exclude {pattern}: no file or folder of {source} is called that")
    excluded = {f"{pattern} ({count:,} files or folders)": "excluded" for pattern, count in contents.excluded.items()}
    contents.unused |= excluded
    name = path.resolve().name if path.exists() and source != AVATARS else source
    if name == AVATARS and source != AVATARS:
        name = f"{AVATARS} (a folder)"  # not the embedded dataset

    # The requested part. `total` counts before `num_images` cuts: it is what `left_out` is a share of.
    plan = Plan(name, contents)
    rows, left_out = _assemble(source, contents, options)
    if options.split is not None:
        if contents.splits is None:
            raise ValueError(f"split={options.split!r}: {source} has no splits")
        rows = rows.select(np.flatnonzero(np.array(rows["split"][:]) == options.split))
        if not len(rows):
            raise ValueError(f"split={options.split!r}: {source} has no such images")
    total = len(rows) + len(_once(left_out))
    if options.num_images is not None and source != AVATARS:
        rows = _take(rows, options, plan)

    fingerprint = _fingerprint(rows, left_out)
    left_out = _once(left_out)
    rows = rows.remove_columns([name for name in (_SIZE, _GROUP) if name in rows.column_names])
    plan.describe(rows, left_out)
    contents.forget_rows()
    if "train" not in plan.counts and options.split is None:
        contents.choices.append("no training images (--split_from none reads all as training images)")
    return Source(name, rows, left_out, total, fingerprint, plan)


def _check(source: str, options: SourceOptions) -> None:
    """Check the options before anything is read or rendered."""
    if not isinstance(source, str | Path):
        raise TypeError(f"source: expected a folder, a dataset on the Hub (OWNER/NAME) or {AVATARS!r}, got {source!r}")
    if options.num_images is not None and options.num_images < 1:
        raise ValueError(f"num_images={options.num_images} must be at least 1")
    if options.seed < 0:
        raise ValueError(f"seed={options.seed} must be at least 0")
    if options.split is not None and options.split not in set(SPLITS.values()):
        raise ValueError(f"split={options.split!r} is unknown; valid names are train, validation, test")
    if source == AVATARS and options.split is not None:
        raise ValueError(f"split={options.split!r}: {source} has no splits")


def _check_no_dataset(source: str, options: SourceOptions) -> None:
    """Refuse options that only a dataset has a meaning for."""
    for name in ("image_column", "dataset_config_name"):
        if value := getattr(options, name):
            kind = "rendered" if source == AVATARS else "a folder of images"
            raise ValueError(f"--{name} {value}: only a dataset has one, and {source} is {kind}; leave the option out")


def _read_avatars(options: SourceOptions) -> Contents:
    """Open the embedded dataset, rendering it in one process more per 200 avatars."""
    count = options.num_images or DEFAULT_NUM_AVATARS
    rows = open_avatars(count, options.avatar_size, options.seed, num_proc=min(available_cpus(), 1 + count // 200))
    contents = Contents("embedded dataset of rendered faces", list(rows["id"][:]))
    contents.images = rows.select_columns("image").cast_column("image", Image(decode=False))
    names = condition_names(rows.column_names)
    contents.columns = {name: Column(rows[name][:]) for name in names}
    return contents


def _assemble(source: str, contents: Contents, options: SourceOptions) -> tuple[Dataset, list[tuple[str, str]]]:
    """Assemble the rows of a source, of all splits, without duplicates and rows that are to be left out.

    Returns:
        The rows, with columns for size and group, and what is left out of `options.split`.

    Raises:
        ValueError: if a requested condition does not exist or cannot be one, or is missing in a whole split.
    """
    ids, reasons = contents.ids, _duplicates(contents.ids)
    data: dict[str, Any] = {"id": ids, _GROUP: contents.groups or [""] * len(ids)}
    features: dict[str, Any] = {"id": Value("string"), _GROUP: Value("string")}
    if contents.sizes:
        data[_SIZE], features[_SIZE] = contents.sizes, Value("int64")
    if contents.splits is not None:
        data["split"], features["split"] = contents.splits, Value("string")

    # Conditions.
    for name, column in _wanted_columns(source, contents, options).items():
        requested = options.conditions is not None
        condition = infer_condition(name, column, requested)
        if not requested and column.origin != "folder" and _tells_splits_apart(name, column):
            condition = f"names splits, but only a column called split is read so (--conditions {name})"
        if isinstance(condition, str):
            if requested:
                raise ValueError(f"--conditions {name}: {condition}")
            contents.unused[f"column {name}" if name else "column without a name"] = condition
            continue
        values, features[name] = condition
        data[name] = pa.array(values, mask=values < 0)
        if options.missing == "leave_out":
            missing = np.flatnonzero(values < 0).tolist()
            reasons |= {row: f"no value of {name}" for row in missing if row not in reasons}
        if requested and not options.allow_partial:
            _check_splits_have(name, values, contents.splits)
    assert contents.images is not None  # every reader sets them
    table = pa.table(data).cast(Features(features).arrow_schema)
    rows = concatenate_datasets([Dataset(table), contents.images], axis=1)
    rows = rows.select_columns(["id", "image", *(name for name in data if name != "id")])

    # Rows that are left out, of the requested split.
    left_out = contents.left_out
    if reasons:
        splits = contents.splits or [options.split or "train"] * len(ids)
        of_split = [row for row in sorted(reasons) if options.split in (None, splits[row])]
        left_out = left_out + [(ids[row], reasons[row]) for row in of_split]
        rows = rows.select([row for row in range(len(ids)) if row not in reasons])
    return rows, left_out


def _once(left_out: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the first reason of each image: one whose row cannot be used has no row besides."""
    unusable = {image_id for image_id, reason in left_out if not reason.startswith("no row in ")}
    return [(i, reason) for i, reason in left_out if i not in unusable or not reason.startswith("no row in ")]


def _duplicates(ids: list[str]) -> dict[int, str]:
    """Return the reason to leave out each row whose id an earlier row has."""
    if len(pa.array(ids, pa.string()).unique()) == len(ids):
        return {}
    first = {image_id: row for row, image_id in reversed(list(enumerate(ids)))}
    return {row: "duplicate id" for row, image_id in enumerate(ids) if first[image_id] != row}


def _wanted_columns(source: str, contents: Contents, options: SourceOptions) -> dict[str, Column]:
    """Return the columns that may become conditions: all, or the requested ones in their order.

    Raises:
        ValueError: for a requested column that the source does not have.
    """
    columns = dict(contents.columns)
    for name in set(RESERVED) & columns.keys():
        contents.unused[f"column {name}"] = "the name is taken; rename it to use it"
        del columns[name]
    if options.conditions is None:
        return columns
    unknown = [name for name in options.conditions if name not in columns]
    if unknown:
        has = f"the columns {shortened([*columns], 20)}" if columns else "no columns"
        raise ValueError(f"--conditions {unknown[0]}: {source} has no such column or folders; it has {has}")
    contents.unused |= {f"column {name}": "not requested" for name in columns if name not in options.conditions}
    return {name: columns[name] for name in options.conditions}


def _tells_splits_apart(name: str, column: Column) -> bool:
    """Check for a column whose values are names of splits, or that is called is_train, test_set and the like."""
    if split_of_folder(re.sub(r"^(is|in)[-_ ]", "", name)):
        return True
    try:
        named = {split_named(str(value)) for value in column.encode()[0] if value is not None}
    except TypeError:  # lists
        return False
    return len(named) > 1 and None not in named


def _check_splits_have(name: str, ids: np.ndarray, splits: list[str] | None) -> None:
    """Refuse a requested condition that no image of a split has."""
    for split in sorted(set(splits or [])):
        if (ids[np.array(splits) == split] < 0).all():
            raise ValueError(
                f"--conditions {name}: no {split} image has a value (--allow_partial reads the source nevertheless)"
            )


def _take(rows: Dataset, options: SourceOptions, plan: Plan) -> Dataset:
    """Take `num_images` of the training or the requested split, spread over classes and folders by the seed."""
    split = options.split or "train"
    candidates = np.arange(len(rows))
    if "split" in rows.column_names:
        candidates = np.flatnonzero(np.array(rows["split"][:]) == split)
        if not len(candidates):
            raise ValueError(f"num_images={options.num_images}: there are no {split} images to take them from")
    count = options.num_images
    assert count is not None
    if count >= len(candidates) and len(candidates) == len(rows):
        return rows

    # The images of each group in random order, one of each group in turn.
    order = np.random.default_rng([options.seed, 2]).permutation(candidates)
    groups = list(zip(*(np.array(rows[name][:])[order].tolist() for name in _group_columns(rows)), strict=True))
    position: dict[tuple, int] = {}
    ranks = []
    for group in groups:
        ranks.append(position.get(group, 0))
        position[group] = ranks[-1] + 1
    taken = np.sort(order[np.argsort(np.array(ranks), kind="stable")[:count]])
    over = f", spread over {len(position):,} classes and folders" if len(position) > 1 else ""
    plan.contents.choices.append(f"--num_images takes {len(taken):,} of {len(candidates):,} {split} images{over}")
    return rows.select(taken)


def _group_columns(rows: Dataset) -> list[str]:
    """Return the columns over whose values the images to take are spread: folder or shard, and classes."""
    return [_GROUP, *(name for name, feature in rows.features.items() if isinstance(feature, ClassLabel))]


def _fingerprint(rows: Dataset, left_out: list[tuple[str, str]]) -> str:
    """Return the SHA-256 of the rows and of `left_out`; the images count by their sizes, not by their content."""
    digest = hashlib.sha256(json.dumps(left_out).encode())
    # Columns in the order of their names, so that the order in which a source has them does not matter.
    hashed = sorted(set(rows.column_names) - {"image", _GROUP})
    called = {name: "size" if name == _SIZE else name for name in hashed}
    for name in sorted(called, key=called.__getitem__):
        digest.update(called[name].encode())
        for batch in rows.select_columns(name).with_format("arrow").iter(100_000):
            digest.update(json.dumps(batch[name].to_pylist()).encode())
    return digest.hexdigest()
