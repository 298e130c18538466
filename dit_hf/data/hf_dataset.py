"""Read sources through `datasets`: parquet, webdataset and Arrow shards, saved datasets, and datasets on the Hub."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pyarrow.compute as pc
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Image,
    Value,
    concatenate_datasets,
    get_dataset_config_names,
    load_dataset,
    load_from_disk,
)

from ..storage import first_line
from .celeba import CELEBA_LISTS
from .conditions import Column
from .image_folder import EXTENSIONS, walk
from .metadata import METADATA
from .splits import SPLITS

MAX_PREVIEWS = 10  # images that may lie beside shards without making the folder one of images
_LOADERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}


def holds_dataset(folder: Path) -> bool:
    """Check whether a folder holds a dataset (of `save_to_disk`, or parquet, webdataset or Arrow shards), not images.

    Up to 10 images beside shards are previews, unless there is a list or metadata file of images.
    """
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return True
    num_images, has_shards = 0, False
    for name, _ in walk(str(folder), "", set()):
        file = PurePosixPath(name)
        suffix = file.suffix.lower()
        num_images += suffix in EXTENSIONS
        if num_images > MAX_PREVIEWS or file.name in METADATA or file.stem in CELEBA_LISTS:
            return False
        has_shards = has_shards or suffix in _LOADERS
    return has_shards


def read_hf_dataset(
    source: str, dataset_config_name: str | None
) -> tuple[list[str], Dataset, list[int], dict[str, Column]]:
    """Read parquet, webdataset or Arrow shards, a saved dataset, or a dataset on the Hub.

    Returns:
        Per row, all splits one after another: ids, images (a dataset with nothing but the undecoded `image`), sizes of
        the images in bytes, and the columns that may become conditions, with `split` among them.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the source cannot be loaded or has no column of images.
    """
    ids: list[str] = []
    sizes: list[int] = []
    columns: dict[str, Column] = {}
    images = []
    loaded = _load(source, dataset_config_name)
    for part_split, part in loaded.items():
        # Ids and sizes.
        image = _image_column(source, part)
        ids += _ids(str(part_split), part)
        sizes += _image_sizes(part.select_columns(image))

        # Columns; one that a split lacks is None there.
        others = _plain_columns(part.remove_columns(image))
        others.setdefault("split", Column([SPLITS.get(str(part_split).lower(), "train")] * len(part)))
        for name, column in others.items():
            whole = columns.setdefault(name, Column([None] * (len(ids) - len(part)), column.labels))
            whole.values += column.values
        for name in columns.keys() - others.keys():
            columns[name].values += [None] * len(part)

        # Images, under the same name in all splits.
        part = part.select_columns(image).rename_column(image, "image") if image != "image" else part
        images.append(part.select_columns("image").cast_column("image", Image(decode=False)))
    return ids, concatenate_datasets(images), sizes, columns


def _load(source: str, dataset_config_name: str | None) -> DatasetDict:
    """Load a source as splits."""
    path = Path(source)
    if not path.exists() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"source {source}: no such folder (a dataset on the Hub is spelled OWNER/NAME)")
    if path.is_file() and path.suffix.lower() not in _LOADERS:
        raise ValueError(f"source {source}: expected a {', '.join(_LOADERS)} file, or the folder of the images")
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = load_from_disk(source)
        elif path.is_file():
            loaded = load_dataset(_LOADERS[path.suffix.lower()], data_files=source)
        else:
            loaded = load_dataset(source, dataset_config_name)
    except Exception as error:  # readers of files and of the Hub raise errors of many classes
        reason = first_line(error)
        # The text of an error of datasets 5.2, which lists the configurations as Python code.
        if reason == "Config name is missing":
            reason = f"name one by --dataset_config_name: {', '.join(get_dataset_config_names(source))}"
        missing = "" if path.exists() else "no such folder, and as a dataset on the Hub: "
        raise ValueError(f"source {source}: {missing}{reason}") from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({str(loaded.split or "train"): loaded})


def _image_column(source: str, part: Dataset) -> str:
    """Return the column of images: `image`, or else the first column whose feature is an image."""
    names = [name for name, feature in part.features.items() if isinstance(feature, Image)]
    if not names:
        raise ValueError(f"source {source}: no column of images; it has {', '.join(part.column_names)}")
    return "image" if "image" in names else names[0]


def _ids(split: str, part: Dataset) -> list[str]:
    """Return ids: shard and key in a webdataset, split and number of the row in other datasets."""
    if "__key__" in part.column_names:
        shards = [PurePosixPath(str(url)).stem for url in part["__url__"]]
        return [f"{shard}/{key}" for shard, key in zip(shards, part["__key__"], strict=True)]
    return [f"{split}-{row}" for row in range(len(part))]


def _image_sizes(images: Dataset) -> list[int]:
    """Return the size of each stored image in bytes, from Arrow's offsets alone; 0 if only a path is stored."""
    (name,) = images.column_names
    sizes: list[int] = []
    for batch in images.with_format("arrow").iter(1000):
        lengths = pc.binary_length(pc.struct_field(batch[name], "bytes"))
        sizes += pc.fill_null(lengths, 0).to_pylist()
    return sizes


def _plain_columns(part: Dataset) -> dict[str, Column]:
    """Return the columns of numbers, booleans, strings and classes, also from inside a struct (webdataset's json)."""
    columns: dict[str, Column] = {}
    for name, feature in part.flatten().features.items():
        short = name.rpartition(".")[2]
        if short.startswith("__") or not isinstance(feature, Value | ClassLabel):
            continue
        # A column `split` counts only if all its values are names of splits.
        values = list(part.flatten()[name])
        if short == "split" and not all(str(value).lower() in SPLITS for value in values):
            continue
        if short == "split":
            values = [SPLITS[str(value).lower()] for value in values]
        columns[short] = Column(values, feature.names if isinstance(feature, ClassLabel) else None)
    return columns
