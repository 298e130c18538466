"""Sources that `datasets` reads: parquet, webdataset and Arrow shards, saved data sets, and the Hub's."""

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

MAX_PREVIEWS = 10  # so many images may lie beside shards
_LOADERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}


def holds_dataset(folder: Path) -> bool:
    """Whether a folder is one of `save_to_disk`, or of parquet, webdataset or arrow shards and not of images.

    Few images beside shards are previews, unless there is a list of them.
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


def read_hf_dataset(
    source: str, dataset_config_name: str | None
) -> tuple[list[str], Dataset, list[int], dict[str, Column]]:
    """Read what `datasets` loads: parquet or webdataset shards, a saved data set, or an id of the Hub.

    Returns:
        Row by row: ids, images (a data set with the undecoded `image` alone) and their sizes in bytes; and the columns
        that may become conditions, `split` among them.
    """
    ids: list[str] = []
    sizes: list[int] = []
    columns: dict[str, Column] = {}
    images = []
    loaded = _load(source, dataset_config_name)
    for part_split, part in loaded.items():
        image = _image_column(source, part)
        ids += _ids(str(part_split), part)
        sizes += _image_sizes(part.select_columns(image))
        others = _plain_columns(part.remove_columns(image))
        others.setdefault("split", Column([SPLITS.get(str(part_split).lower(), "train")] * len(part)))
        for name, column in others.items():
            whole = columns.setdefault(name, Column([None] * (len(ids) - len(part)), column.labels))
            whole.values += column.values
        for name in columns.keys() - others.keys():
            columns[name].values += [None] * len(part)
        part = part.select_columns(image).rename_column(image, "image") if image != "image" else part
        images.append(part.select_columns("image").cast_column("image", Image(decode=False)))
    return ids, concatenate_datasets(images), sizes, columns


def _load(source: str, dataset_config_name: str | None) -> DatasetDict:
    path = Path(source)
    if not path.exists() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"source {source}: no such folder (a data set of the Hub is spelled OWNER/NAME)")
    if path.is_file() and path.suffix.lower() not in _LOADERS:
        raise ValueError(f"source {source}: of files, {', '.join(_LOADERS)} are read; images, by their folder")
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
    """The column of images: the one called `image`, else the first whose feature is an image."""
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


def _image_sizes(images: Dataset) -> list[int]:
    """Bytes of each stored image, without reading them; 0 where there are none."""
    (name,) = images.column_names
    sizes: list[int] = []
    for batch in images.with_format("arrow").iter(1000):
        lengths = pc.binary_length(pc.struct_field(batch[name], "bytes"))
        sizes += pc.fill_null(lengths, 0).to_pylist()
    return sizes


def _plain_columns(part: Dataset) -> dict[str, Column]:
    """The columns of numbers, booleans, strings and classes; those inside a struct (webdataset's json) too."""
    found: dict[str, Column] = {}
    for name, feature in part.flatten().features.items():
        short = name.rpartition(".")[2]
        if short.startswith("__") or not isinstance(feature, Value | ClassLabel):
            continue
        values = list(part.flatten()[name])
        if short == "split" and not all(str(value).lower() in SPLITS for value in values):
            continue
        if short == "split":
            values = [SPLITS[str(value).lower()] for value in values]
        found[short] = Column(values, feature.names if isinstance(feature, ClassLabel) else None)
    return found
