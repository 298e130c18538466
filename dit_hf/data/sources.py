"""Any source of pictures as rows: `id`, the undecoded `image`, perhaps a `split`, and one column a condition."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    Value,
    concatenate_datasets,
    get_dataset_config_names,
    load_dataset,
    load_from_disk,
)

from ..storage import first_line
from .avatars import open_avatars
from .folders import CELEBA_LISTS, EXTENSIONS, METADATA, SPLITS, read_folder, walk

AVATARS = "avatars"
DEFAULT_NUM_AVATARS = 8000
DEFAULT_AVATAR_SIZE = 64
MAX_CLASSES = 1000
MAX_LEFT_OUT = 0.01  # the share of a source that may be left out before it is an error
MAX_PREVIEWS = 10  # so many pictures may lie beside shards
_BINARY = {1: 1, 0: 0, -1: 0, "1": 1, "0": 0, "-1": 0, "true": 1, "false": 0}  # True is 1
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)")
_SIZE = "__size__"
_LOADERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}


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
        sha256: Of ids, sizes of the pictures, splits and conditions: two sources with the same are the same.
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
    """Open `source`, see [`dit_hf.open_images`], without decoding its pictures.

    Raises:
        FileNotFoundError: if there is no such source, or no picture in it.
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
    elif path.is_dir() and not _holds_data_set(path):
        rows, left_out, unused = _open_folder(path, split)
    else:
        rows, left_out, unused = _open_data_set(source, dataset_config_name, split)
    if split is not None:
        if "split" not in rows.column_names:
            raise ValueError(f"split={split!r}: {source} does not come divided into splits")
        rows = rows.select(np.flatnonzero(np.array(rows["split"][:]) == split))
        if not len(rows):
            raise ValueError(f"split={split!r}: {source} has no such pictures")
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


def available_cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open_avatars(count: int, size: int, seed: int) -> Dataset:
    rows = open_avatars(count, size, seed, num_proc=min(available_cpus(), 1 + count // 200))
    return rows.cast_column("image", Image(decode=False))


def _open_folder(folder: Path, split: str | None) -> tuple[Dataset, list[tuple[str, str]], list[str]]:
    found = read_folder(folder)
    if not found.paths:
        first = f"; {len(found.left_out)} left out, {': '.join(found.left_out[0])}" if found.left_out else ""
        raise FileNotFoundError(f"source {folder}: no pictures in it ({', '.join(EXTENSIONS)}){first}")
    root = folder.resolve()
    images = Dataset.from_dict(
        {"image": [{"bytes": None, "path": str(root / path)} for path in found.paths.values()]},
        features=Features({"image": Image(decode=False)}),
    )
    columns = {name: _Column(values) for name, values in found.columns.items()}
    return _assemble(list(found.paths), images, found.sizes, columns, found.left_out, split)


def _holds_data_set(folder: Path) -> bool:
    """Whether a folder is one of `save_to_disk`, or of parquet, webdataset or arrow shards and not of pictures.

    Few pictures beside shards are previews, unless there is a list of them.
    """
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return True
    pictures, shards = 0, False
    for name, _ in walk(str(folder), "", set()):
        file = PurePosixPath(name)
        suffix = file.suffix.lower()
        pictures += suffix in EXTENSIONS
        if pictures > MAX_PREVIEWS or file.name in METADATA or file.stem in CELEBA_LISTS:
            return False
        shards = shards or suffix in _LOADERS
    return shards


def _open_data_set(
    source: str, dataset_config_name: str | None, split: str | None
) -> tuple[Dataset, list[tuple[str, str]], list[str]]:
    """What `datasets` loads: parquet or webdataset shards, a saved data set, or an id of the Hub."""
    ids: list[str] = []
    sizes: list[int] = []
    columns: dict[str, _Column] = {}
    images = []
    loaded = _load(source, dataset_config_name)
    for part_split, part in loaded.items():
        image = _image_column(source, part)
        ids += _ids(str(part_split), part)
        sizes += _picture_sizes(part.select_columns(image))
        others = _plain_columns(part.remove_columns(image))
        others.setdefault("split", _Column([SPLITS.get(str(part_split).lower(), "train")] * len(part)))
        for name, column in others.items():
            whole = columns.setdefault(name, _Column([None] * (len(ids) - len(part)), column.labels))
            whole.values += column.values
        for name in columns.keys() - others.keys():
            columns[name].values += [None] * len(part)
        part = part.select_columns(image).rename_column(image, "image") if image != "image" else part
        images.append(part.select_columns("image").cast_column("image", Image(decode=False)))
    return _assemble(ids, concatenate_datasets(images), sizes, columns, [], split)


def _load(source: str, dataset_config_name: str | None) -> DatasetDict:
    path = Path(source)
    if not path.exists() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"source {source}: no such folder (a data set of the Hub is spelled OWNER/NAME)")
    if path.is_file() and path.suffix.lower() not in _LOADERS:
        raise ValueError(f"source {source}: of files, {', '.join(_LOADERS)} are read; pictures, by their folder")
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = load_from_disk(source)
        elif path.is_file():
            loaded = load_dataset(_LOADERS[path.suffix.lower()], data_files=source)
        else:
            loaded = load_dataset(source, dataset_config_name)
    except Exception as error:  # readers of files and of the Hub raise anything; what matters is which source it was
        reason = first_line(error)
        if reason == "Config name is missing":
            reason = f"name one by --dataset_config_name: {', '.join(get_dataset_config_names(source))}"
        missing = "" if path.exists() else "no such folder, and as a data set of the Hub: "
        raise ValueError(f"source {source}: {missing}{reason}") from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({str(loaded.split or "train"): loaded})


def _image_column(source: str, part: Dataset) -> str:
    """The column of pictures: the one called `image`, else the first whose feature is an image."""
    names = [name for name, feature in part.features.items() if isinstance(feature, Image)]
    if not names:
        raise ValueError(f"source {source}: no column of images; it has {', '.join(part.column_names)}")
    return "image" if "image" in names else names[0]


def _ids(split: str, part: Dataset) -> list[str]:
    """Webdataset's shard and key; of other data sets the split and the number of the row."""
    if "__key__" in part.column_names:
        shards = [PurePosixPath(str(url)).stem for url in part["__url__"]]
        return [f"{shard}/{key}" for shard, key in zip(shards, part["__key__"], strict=True)]
    return [f"{split}-{row}" for row in range(len(part))]


def _picture_sizes(images: Dataset) -> list[int]:
    """Bytes of each stored picture, without reading them; 0 where there are none."""
    (name,) = images.column_names
    sizes: list[int] = []
    for batch in images.with_format("arrow").iter(1000):
        lengths = pc.binary_length(pc.struct_field(batch[name], "bytes"))
        sizes += pc.fill_null(lengths, 0).to_pylist()
    return sizes


@dataclass
class _Column:
    """A column that may become a condition: one value a row, and the names of its values where it is a class."""

    values: list[Any]
    labels: list[str] | None = None


def _plain_columns(part: Dataset) -> dict[str, _Column]:
    """The columns of numbers, booleans, strings and classes; those inside a struct (webdataset's json) too."""
    found: dict[str, _Column] = {}
    for name, feature in part.flatten().features.items():
        short = name.rpartition(".")[2]
        if short.startswith("__") or not isinstance(feature, Value | ClassLabel):
            continue
        values = list(part.flatten()[name])
        if short == "split" and not all(str(value).lower() in SPLITS for value in values):
            continue
        if short == "split":
            values = [SPLITS[str(value).lower()] for value in values]
        found[short] = _Column(values, feature.names if isinstance(feature, ClassLabel) else None)
    return found


def _assemble(
    ids: list[str],
    images: Dataset,
    sizes: list[int],
    columns: dict[str, _Column],
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
        condition = as_condition(column.values, column.labels)
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


def as_condition(
    values: Sequence[Any], labels: list[str] | None = None
) -> tuple[list[int], Value | ClassLabel] | None:
    """A column as a condition: ids (-1 where there is no value) and the feature; None if it cannot be one.

    Yes and no (also 1 and 0, CelebA's 1 and -1) are int8. Whole numbers and names of which each appears at least twice
    on average are classes, up to 1,000 of them: numbers below 1,000 by themselves, others (`001` too) by their names.
    Free text, running numbers, numbers below 0, measurements and the like are no conditions.
    """
    if labels is not None:
        return [-1 if value is None else value for value in values], ClassLabel(names=labels)
    values = [_simplified(value) for value in values]
    known = {value for value in values if value is not None}
    if not known or not all(isinstance(value, bool | int | float | str) for value in known):
        return None
    if all(value in _BINARY for value in known):
        return [-1 if value is None else _BINARY[value] for value in values], Value("int8")
    if not 1 < len(known) <= min(MAX_CLASSES, len(values) // 2) or any(isinstance(value, float) for value in known):
        return None
    numbers = [int(value) for value in known if _NUMBER.fullmatch(str(value))]
    if any(number < 0 for number in numbers):
        return None
    if len(numbers) == len(known) and max(numbers) < MAX_CLASSES:
        return [-1 if value is None else int(value) for value in values], ClassLabel(num_classes=max(numbers) + 1)
    names = sorted({str(value) for value in known})
    ids = {name: number for number, name in enumerate(names)}
    return [-1 if value is None else ids[str(value)] for value in values], ClassLabel(names=names)


def _simplified(value: Any) -> Any:
    """Strings as lists in files have them: `True` in any case, empty as None."""
    if not isinstance(value, str):
        return value if isinstance(value, bool | int | float) or value is None else str(value)
    value = value.strip()
    return value.lower() if value.lower() in _BINARY else value or None


def _fingerprint(rows: Dataset, left_out: list[tuple[str, str]]) -> str:
    """SHA-256 of everything about the rows but the content of the pictures, of which only the sizes are read."""
    digest = hashlib.sha256(json.dumps(left_out).encode())
    called = {name: "size" if name == _SIZE else name for name in sorted(set(rows.column_names) - {"image"})}
    for name in sorted(called, key=called.__getitem__):
        digest.update(called[name].encode())
        for batch in rows.select_columns(name).with_format("arrow").iter(100_000):
            digest.update(json.dumps(batch[name].to_pylist()).encode())
    return digest.hexdigest()
