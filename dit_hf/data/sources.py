"""Open any source of images as rows: `id`, undecoded `image`, `split` if it has splits, one column per condition."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value, concatenate_datasets

from ..devices import available_cpus
from .avatars import open_avatars
from .conditions import Column, infer_condition
from .hf_dataset import holds_dataset, read_hf_dataset
from .image_folder import EXTENSIONS, read_folder
from .splits import SPLITS

AVATARS = "avatars"
DEFAULT_NUM_AVATARS = 8000
DEFAULT_AVATAR_SIZE = 64
MAX_LEFT_OUT = 0.01  # larger shares of unusable images are an error
_SIZE = "__size__"


@dataclass(frozen=True)
class Source:
    """Opened source of images.

    Attributes:
        name: Name for messages and cards: `avatars`, the folder's name or the Hub id, never a path of this machine.
        rows: `id`, `image` (not decoded), `split` if the source has splits, and the conditions: int8 (1 is yes) or
            `ClassLabel`.
        left_out: Id and reason of each image or row that cannot be used, of the requested split if its split is known.
        unused: Names of columns that cannot be conditions.
        total: Number of images of the split, left out or not, whatever `num_images`.
        sha256: Hash of ids, sizes of the images, splits, conditions and `left_out`; equal hashes mean equal sources.
    """

    name: str
    rows: Dataset
    left_out: list[tuple[str, str]]
    unused: list[str]
    total: int
    sha256: str


def open_source(
    source: str,
    dataset_config_name: str | None = None,
    split: str | None = None,
    num_images: int | None = None,
    seed: int = 0,
    avatar_size: int = DEFAULT_AVATAR_SIZE,
) -> Source:
    """Open `source` without decoding its images.

    Args:
        source: See [`dit_hf.open_images`], as for the other options.
        dataset_config_name: The configuration of a dataset on the Hub.
        split: Open only this split.
        num_images: Open only the first `num_images` rows.
        seed: Seed of the avatars.
        avatar_size: Side of the avatars in pixels.

    Raises:
        FileNotFoundError: if the source does not exist or holds no image.
        ValueError: for options that do not fit the source, or lists that cannot be read.
    """
    # Options, checked before any avatar is rendered.
    if num_images is not None and num_images < 1:
        raise ValueError(f"num_images={num_images} must be at least 1")
    if split is not None and split not in set(SPLITS.values()):
        raise ValueError(f"split={split!r} is unknown; valid names are train, validation, test")
    if source == AVATARS and split is not None:
        raise ValueError(f"split={split!r}: {source} has no splits")

    # Rows of the whole source.
    path = Path(source)
    left_out: list[tuple[str, str]] = []
    unused: list[str] = []
    if source == AVATARS:
        rows = _open_avatars(num_images or DEFAULT_NUM_AVATARS, avatar_size, seed)
    elif path.is_dir() and not holds_dataset(path):
        rows, left_out, unused = _open_folder(path, split)
    else:
        ids, images, sizes, columns = read_hf_dataset(source, dataset_config_name)
        rows, left_out, unused = _assemble(ids, images, sizes, columns, left_out, split)

    # The requested part. `total` counts before `num_images` cuts: it is what `left_out` is a share of.
    if split is not None:
        if "split" not in rows.column_names:
            raise ValueError(f"split={split!r}: {source} has no splits")
        rows = rows.select(np.flatnonzero(np.array(rows["split"][:]) == split))
        if not len(rows):
            raise ValueError(f"split={split!r}: {source} has no such images")
    total = len(rows) + len(left_out)
    if num_images is not None and num_images < len(rows):
        rows = rows.select(range(num_images))

    # Hash and name.
    fingerprint = _fingerprint(rows, left_out)
    if _SIZE in rows.column_names:
        rows = rows.remove_columns(_SIZE)
    name = path.resolve().name if path.exists() and source != AVATARS else source
    if name == AVATARS and source != AVATARS:
        name = f"{AVATARS} (a folder)"  # not the embedded dataset
    return Source(name, rows, left_out, unused, total, fingerprint)


def _open_avatars(count: int, size: int, seed: int) -> Dataset:
    """Open the embedded dataset, rendering it in one process more per 200 avatars."""
    rows = open_avatars(count, size, seed, num_proc=min(available_cpus(), 1 + count // 200))
    return rows.cast_column("image", Image(decode=False))


def _open_folder(folder: Path, split: str | None) -> tuple[Dataset, list[tuple[str, str]], list[str]]:
    """Open a folder of images; see `_assemble` for what is returned."""
    contents = read_folder(folder)
    if not contents.paths:
        first = f"; {len(contents.left_out)} left out, {': '.join(contents.left_out[0])}" if contents.left_out else ""
        raise FileNotFoundError(f"source {folder}: no images in it ({', '.join(EXTENSIONS)}){first}")
    root = folder.resolve()
    images = Dataset.from_dict(
        {"image": [{"bytes": None, "path": str(root / path)} for path in contents.paths.values()]},
        features=Features({"image": Image(decode=False)}),
    )
    columns = {name: Column(values) for name, values in contents.columns.items()}
    return _assemble(list(contents.paths), images, contents.sizes, columns, contents.left_out, split)


def _assemble(
    ids: list[str],
    images: Dataset,
    sizes: list[int],
    columns: dict[str, Column],
    left_out: list[tuple[str, str]],
    split: str | None,
) -> tuple[Dataset, list[tuple[str, str]], list[str]]:
    """Assemble the rows of a source from its ids, images, sizes in bytes and columns.

    Returns:
        Rows of all splits, with a column for the size, without duplicates and rows that lack a condition; `left_out`
        with those of `split`; names of the columns that cannot be conditions.
    """
    # Duplicate ids; the first row of an id counts.
    reasons: dict[int, str] = {}
    first = {image_id: row for row, image_id in reversed(list(enumerate(ids)))}
    reasons |= {row: "duplicate id" for row, image_id in enumerate(ids) if first[image_id] != row}

    # Columns.
    data: dict[str, list] = {"id": ids, _SIZE: sizes}
    features: dict[str, Any] = {"id": Value("string"), _SIZE: Value("int64")}
    if "split" in columns:
        data["split"] = columns.pop("split").values
        features["split"] = Value("string")
    unused = []
    for name, column in columns.items():
        condition = infer_condition(column.values, column.labels)
        if condition is None or name in ("id", "image"):
            unused.append(name)
            continue
        data[name], features[name] = condition
        for row in np.flatnonzero(np.array(data[name]) < 0).tolist():
            reasons.setdefault(row, f"no value of {name}")
    rows = concatenate_datasets([Dataset.from_dict(data, Features(features)), images], axis=1)

    # Rows that are left out.
    if reasons:
        splits = data.get("split", [split] * len(ids))
        of_split = [row for row in sorted(reasons) if split in (None, splits[row])]
        left_out = left_out + [(ids[row], reasons[row]) for row in of_split]
        rows = rows.select([row for row in range(len(ids)) if row not in reasons])
    return rows, left_out, unused


def _fingerprint(rows: Dataset, left_out: list[tuple[str, str]]) -> str:
    """Return the SHA-256 of the rows and of `left_out`; the images count by their sizes, not by their content."""
    digest = hashlib.sha256(json.dumps(left_out).encode())
    # Columns in the order of their names, so that the order in which a source has them does not matter.
    called = {name: "size" if name == _SIZE else name for name in sorted(set(rows.column_names) - {"image"})}
    for name in sorted(called, key=called.__getitem__):
        digest.update(called[name].encode())
        for batch in rows.select_columns(name).with_format("arrow").iter(100_000):
            digest.update(json.dumps(batch[name].to_pylist()).encode())
    return digest.hexdigest()
