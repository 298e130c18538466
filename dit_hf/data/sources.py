"""Any source of images as rows: `id`, the undecoded `image`, perhaps a `split`, and one column a condition."""

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
MAX_LEFT_OUT = 0.01  # the share of a source that may be left out before it is an error
_SIZE = "__size__"


@dataclass(frozen=True)
class Source:
    """An opened source.

    Attributes:
        name: What to call it: `avatars`, the folder's name or the Hub id; never a path of this machine.
        rows: `id`, `image` (not decoded), `split` if the source comes divided, and the conditions: int8 (1 is yes)
            or `ClassLabel`.
        left_out: What of the source is no usable row, and of the split as far as that is known: id and reason.
        unused: The names of its columns that are no conditions.
        total: How many it has with these, `num_images` or not.
        sha256: Of ids, sizes of the images, splits and conditions: two sources with the same are the same.
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
    """Open `source`, see [`dit_hf.open_images`], without decoding its images.

    Raises:
        FileNotFoundError: if there is no such source, or no image in it.
        ValueError: for options that do not fit it, or lists that cannot be read.
    """
    if num_images is not None and num_images < 1:
        raise ValueError(f"num_images={num_images} must be at least 1")
    if split is not None and split not in set(SPLITS.values()):
        raise ValueError(f"split={split!r} is unknown; known are train, validation, test")
    path, left_out, unused = Path(source), list[tuple[str, str]](), list[str]()
    if source == AVATARS and split is not None:  # said before they are drawn
        raise ValueError(f"split={split!r}: {source} does not come divided into splits")
    if source == AVATARS:
        rows = _open_avatars(num_images or DEFAULT_NUM_AVATARS, avatar_size, seed)
    elif path.is_dir() and not holds_dataset(path):
        rows, left_out, unused = _open_folder(path, split)
    else:
        rows, left_out, unused = _assemble(*read_hf_dataset(source, dataset_config_name), [], split)
    if split is not None:
        if "split" not in rows.column_names:
            raise ValueError(f"split={split!r}: {source} does not come divided into splits")
        rows = rows.select(np.flatnonzero(np.array(rows["split"][:]) == split))
        if not len(rows):
            raise ValueError(f"split={split!r}: {source} has no such images")
    total = len(rows) + len(left_out)
    if num_images is not None and num_images < len(rows):
        rows = rows.select(range(num_images))
    fingerprint = _fingerprint(rows, left_out)
    if _SIZE in rows.column_names:
        rows = rows.remove_columns(_SIZE)
    name = path.resolve().name if path.exists() and source != AVATARS else source
    if name == AVATARS and source != AVATARS:
        name = f"{AVATARS} (a folder)"  # and not the embedded data set
    return Source(name, rows, left_out, unused, total, fingerprint)


def _open_avatars(count: int, size: int, seed: int) -> Dataset:
    rows = open_avatars(count, size, seed, num_proc=min(available_cpus(), 1 + count // 200))
    return rows.cast_column("image", Image(decode=False))


def _open_folder(folder: Path, split: str | None) -> tuple[Dataset, list[tuple[str, str]], list[str]]:
    found = read_folder(folder)
    if not found.paths:
        first = f"; {len(found.left_out)} left out, {': '.join(found.left_out[0])}" if found.left_out else ""
        raise FileNotFoundError(f"source {folder}: no images in it ({', '.join(EXTENSIONS)}){first}")
    root = folder.resolve()
    images = Dataset.from_dict(
        {"image": [{"bytes": None, "path": str(root / path)} for path in found.paths.values()]},
        features=Features({"image": Image(decode=False)}),
    )
    columns = {name: Column(values) for name, values in found.columns.items()}
    return _assemble(list(found.paths), images, found.sizes, columns, found.left_out, split)


def _assemble(
    ids: list[str],
    images: Dataset,
    sizes: list[int],
    columns: dict[str, Column],
    left_out: list[tuple[str, str]],
    split: str | None,
) -> tuple[Dataset, list[tuple[str, str]], list[str]]:
    """Rows without duplicates and without those that lack a condition, what is left out of `split`, unused columns."""
    reasons: dict[int, str] = {}
    first = {image_id: row for row, image_id in reversed(list(enumerate(ids)))}
    reasons |= {row: "duplicate id" for row, image_id in enumerate(ids) if first[image_id] != row}
    data: dict[str, list] = {"id": ids, _SIZE: sizes}
    features: dict[str, Any] = {"id": Value("string"), _SIZE: Value("int64")}
    if "split" in columns:
        data["split"], features["split"] = columns.pop("split").values, Value("string")
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
    if reasons:
        parts = data.get("split", [split] * len(ids))
        wanted = [row for row in sorted(reasons) if split in (None, parts[row])]
        left_out = left_out + [(ids[row], reasons[row]) for row in wanted]
        rows = rows.select([row for row in range(len(ids)) if row not in reasons])
    return rows, left_out, unused


def _fingerprint(rows: Dataset, left_out: list[tuple[str, str]]) -> str:
    """SHA-256 of everything about the rows but the content of the images, of which only the sizes are read."""
    digest = hashlib.sha256(json.dumps(left_out).encode())
    called = {name: "size" if name == _SIZE else name for name in sorted(set(rows.column_names) - {"image"})}
    for name in sorted(called, key=called.__getitem__):
        digest.update(called[name].encode())
        for batch in rows.select_columns(name).with_format("arrow").iter(100_000):
            digest.update(json.dumps(batch[name].to_pylist()).encode())
    return digest.hexdigest()
