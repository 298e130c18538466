"""Read sources through `datasets`: parquet, webdataset and Arrow shards, saved datasets, and datasets on the Hub."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Image,
    Value,
    concatenate_datasets,
    get_dataset_config_names,
    load_dataset_builder,
    load_from_disk,
)
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from ..hub_ids import split_revision
from ..pipelines.image_inputs import IMAGE_SUFFIXES
from ..storage import nearest_folder
from .celeba import CELEBA_LISTS
from .contents import Column, Contents, SourceOptions, short_names
from .files import CACHE_INFO, Skipped, walk
from .metadata import METADATA
from .shard_files import LOADERS, cause_of, load_repository, load_shards, with_stored_classes
from .splits import split_named
from .stored_images import image_paths, image_size, is_image, parse_address
from .stored_paths import drop_foreign_paths, own_folders
from .webdataset import KEY, SHARD, VALUES, archive_columns, read_folders_inside

MAX_PREVIEWS = 10  # images that may lie beside shards without being another reading of the folder
_BASE64_SIGNATURES = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD", "Qk0", "SUkqA", "TU0AK")


def holds_dataset(folder: Path, options: SourceOptions) -> bool:
    """Check whether a folder holds a dataset (of `save_to_disk`, or parquet, webdataset or Arrow shards), not images.

    Up to 10 images beside shards are previews, unless there is a list or metadata file of images.

    Raises:
        ValueError: if there are shards and more images than previews.
    """
    if _is_saved(folder) or _has_own_card(folder):
        return True
    num_images, first_image, shards = 0, "", []
    for name, _ in walk(folder, options, Skipped()):
        file = PurePosixPath(name)
        suffix = file.suffix.lower()
        if file.name in METADATA or file.stem in CELEBA_LISTS:
            return False
        if suffix in IMAGE_SUFFIXES:
            num_images, first_image = num_images + 1, first_image or name
        elif suffix in LOADERS:
            shards.append(name)
    if shards and num_images > MAX_PREVIEWS:
        raise ValueError(
            f"source {folder} holds {num_images:,} images (first {first_image}) and {len(shards):,} shards (first "
            f"{shards[0]}): name the folder of those to be read as the source, or --exclude the others"
        )
    return bool(shards)


def read_hf_dataset(source: str, options: SourceOptions) -> Contents:
    """Read shards, a saved dataset or a dataset on the Hub, all splits one after another.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the source cannot be loaded, has no column of images, or can be read in two ways.
    """
    contents = Contents("dataset")
    loaded = _load(source, options, contents)
    parts = _splits(loaded, options, contents)

    # The column of images is the same in all splits; structs become columns, so that an image may be inside one.
    # Readers of shards have found the images already.
    if not contents.addressed:
        parts = {name: _with_image_features(part) for name, part in parts.items()}
    parts = {name: _flattened(part) for name, part in parts.items()}
    contents.image_column = _image_column(source, next(iter(parts.values())), options, contents)
    images, columns, foreign = [], [], 0
    for name, part in parts.items():
        contents.ids += _ids(name, part)
        contents.groups += part[SHARD] if SHARD in part.column_names else [name] * len(part)
        undecoded = _undecoded_images(part, contents.image_column)
        own, dropped = drop_foreign_paths(undecoded, own_folders(source), contents.addressed)
        images.append(own)
        foreign += dropped
        contents.sizes += _addressed_sizes(own) if contents.addressed else _image_sizes(own)
        columns.append(_plain_columns(part.remove_columns(contents.image_column), contents))
    contents.images = concatenate_datasets(images)
    if foreign:
        contents.unused["paths"] = f"{foreign:,} images are stored as paths outside the source, which are not read"
    contents.columns = _joined(columns, [len(part) for part in parts.values()])
    if len(set(contents.ids)) < len(contents.ids):  # the same keys in several splits
        names = [name for name, part in parts.items() for _ in range(len(part))]
        contents.ids = [f"{name}/{image_id}" for name, image_id in zip(names, contents.ids, strict=True)]

    if all(KEY in part.column_names for part in parts.values()):
        read_folders_inside(source, parts, options, contents)
    _read_split_column(options, contents)
    if options.split_from == "column" and contents.split_origin != "by column":
        raise ValueError(f"--split_from column: {source} has no column `split` of split names")
    if options.split_from == "none":
        contents.splits, contents.split_origin = None, ""
    return contents


def _read_split_column(options: SourceOptions, contents: Contents) -> None:
    """Read a column `split`, which counts more than the names of splits if all its values name one."""
    column = contents.columns.pop("split", None)
    if column is None:
        return
    labels, values = column.labels, column.values
    if isinstance(values, pa.Array):
        values = values.to_pylist()
    if labels is not None:
        values = [labels[int(value)] if value is not None and value >= 0 else None for value in values]
    named = [split_named(str(value)) for value in values]
    if options.split_from not in (None, "column"):
        contents.unused["column split"] = f"--split_from {options.split_from}"
    elif not any(named) or (contents.split_origin and not all(named)):
        contents.unused["column split"] = "its values name no splits"
    else:
        # An unknown name must not be read as any of the known splits.
        rows = zip(contents.ids, values, named, strict=True)
        contents.left_out += [
            (image_id, f"split {value!r} is unknown") for image_id, value, split in rows if not split
        ]
        contents.keep_splits(named)
        contents.split_origin = "by column"


def _load(source: str, options: SourceOptions, contents: Contents) -> DatasetDict:
    """Load a source as its own splits, whatever their names."""
    path, (repo_id, revision) = Path(source), split_revision(source)
    if not path.exists() and (repo_id.count("/") != 1 or source.startswith((".", "/", "~"))):
        near = nearest_folder(path)
        hint = f"did you mean {near}?" if near else "a dataset on the Hub is spelled OWNER/NAME"
        raise FileNotFoundError(f"source {source}: no such folder; {hint}")
    if (path / CACHE_INFO).is_file():
        raise ValueError(
            f"source {source} is a latent cache, whose images are encoded already: "
            f"dit-hf train celeba --data.latents {source} trains on it"
        )
    if path.is_file() and path.suffix.lower() not in LOADERS:
        raise ValueError(f"source {source}: expected a {', '.join(LOADERS)} file, or the folder of the images")
    if path.exists() and not _is_saved(path) and not _has_own_card(path):
        return load_shards(path, options, contents)
    try:
        if _is_saved(path):
            contents.kind = "saved dataset"
            loaded = load_from_disk(source)
        else:
            contents.kind = "dataset with a card" if path.exists() else "dataset on the Hub"
            builder = load_dataset_builder(repo_id, options.dataset_config_name, revision=revision)
            files = builder.config.data_files or {}
            if isinstance(builder, Parquet | WebDataset):
                files = {str(split): [*map(str, group)] for split, group in files.items()}
                kind = "parquet" if isinstance(builder, Parquet) else "webdataset"
                return load_repository(kind, files, builder.info.features, options, contents)
            builder.download_and_prepare()
            loaded = with_stored_classes(builder.as_dataset(), files)
    except Exception as error:  # readers of files and of the Hub raise errors of many classes
        raise ValueError(f"source {source}: {_load_problem(source, error)}") from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({str(loaded.split or "train"): loaded})


def _is_saved(folder: Path) -> bool:
    """Check for a dataset, or splits, that `save_to_disk` wrote."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _has_own_card(folder: Path) -> bool:
    """Check for the card of a repository that says which files are which split, which `datasets` reads."""
    card = folder / "README.md"
    return card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8", errors="replace").split("\n---")[0]


def _load_problem(source: str, error: Exception) -> str:
    reason = cause_of(error)
    # The text of an error of datasets 5.2, which lists the configurations as Python code.
    if reason == "Config name is missing":
        repo_id, revision = split_revision(source)
        names = get_dataset_config_names(repo_id, revision=revision)
        reason = f"name one by --dataset_config_name: {', '.join(names)}"
    return reason if Path(source).exists() else f"no such folder, and as a dataset on the Hub: {reason}"


def _splits(loaded: DatasetDict, options: SourceOptions, contents: Contents) -> dict[str, Dataset]:
    """Return the parts of a dataset that are read, by their own names, and set `contents.splits`.

    A part whose name is no split's is not read, unless it is the only one.
    """
    parts = {str(name): part for name, part in loaded.items()}
    if len(parts) == 1 or options.split_from == "none":
        named = {name: split_named(name) or "train" for name in parts}
    else:
        named = {name: split for name in parts if (split := split_named(name))}
        if not named:
            raise ValueError(
                f"the source has the parts {', '.join(parts)}, none of which is named like a split: --split_from none "
                "reads all as training images"
            )
        for name in parts.keys() - named.keys():
            what = (
                f"names no split; {len(parts[name]):,} images (--split_from none reads all parts as training images)"
            )
            contents.unused[f"part {name}"] = what
    contents.splits = [split for name, split in named.items() for _ in range(len(parts[name]))]
    if not contents.split_origin and set(named.values()) != {"train"}:
        contents.split_origin = f"by the source's own: {', '.join(named)}"
    return {name: parts[name] for name in named}


def _with_image_features(part: Dataset) -> Dataset:
    """Give columns that store images as bytes, or as a struct of bytes and path, the feature of an image."""
    for field in part.data.schema:
        is_struct = pa.types.is_struct(field.type) and {f.name for f in field.type} == {"bytes", "path"}
        is_binary = pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
        if not isinstance(part.features[field.name], Image) and (is_struct or is_binary):
            stored = _first_value(part.data.column(field.name))
            stored = stored.get("bytes") if isinstance(stored, dict) else stored
            if is_image(stored):
                part = part.cast_column(field.name, Image())
    return part


def _flattened(part: Dataset) -> Dataset:
    """Return a dataset whose structs are columns; `flatten` takes seconds if there are 10,000 classes."""
    return part.flatten() if any(isinstance(feature, dict) for feature in part.features.values()) else part


def _first_value(column: pa.ChunkedArray) -> Any:
    return next((value.as_py() for value in column if value.is_valid), None)


def _image_column(source: str, part: Dataset, options: SourceOptions, contents: Contents) -> str:
    """Return the column of images: the requested one, `image`, or the only one.

    Raises:
        ValueError: if there is none, or several of which none is called `image`.
    """
    names = [name for name, feature in part.features.items() if isinstance(feature, Image)]
    wanted = None if KEY in part.column_names else options.image_column
    if wanted is not None and wanted not in names:
        have = ", ".join(names) or "none"
        raise ValueError(f"--image_column {wanted}: {source} has no such column of images; it has {have}")
    if not names:
        types = ", ".join(f"{field.name} ({field.type})" for field in part.data.schema if field.name[:2] != "__")
        raise ValueError(f"source {source}: no column of images; it has {types}{_spelled_images(part)}")
    if wanted is None and len(names) > 1 and "image" not in names:
        options_named = " or ".join(f"--image_column {name}" for name in names)
        raise ValueError(f"source {source} has {len(names)} columns of images: name one by {options_named}")
    column = wanted or ("image" if "image" in names else names[0])
    contents.unused |= {f"column {n}": "another column of images (--image_column)" for n in names if n != column}
    return column


def _spelled_images(part: Dataset) -> str:
    """Return what a column of text holds that stands for images, and how it becomes one that is read."""
    for field in part.data.schema:
        if not (pa.types.is_string(field.type) or pa.types.is_large_string(field.type)):
            continue
        text = _first_value(part.data.column(field.name)) or ""
        if text.startswith(("data:image/", *_BASE64_SIGNATURES)):
            return f"; {field.name} holds images as base64: store the bytes, base64.b64decode({field.name})"
        if PurePosixPath(text.split("?")[0]).suffix.lower() in IMAGE_SUFFIXES:
            kind = "URLs" if "://" in text else "paths"
            return (
                f"; {field.name} holds {kind} of images (first {text}): put the images in a folder, with a "
                "metadata.csv whose column file_name names them"
            )
    return ""


def _ids(split: str, part: Dataset) -> list[str]:
    """Return ids: shard and key in a webdataset, split and number of the row in other datasets."""
    if KEY in part.column_names:
        return [f"{shard}/{key}" for shard, key in zip(part[SHARD], part[KEY], strict=True)]
    return [f"{split}-{row}" for row in range(len(part))]


def _undecoded_images(part: Dataset, column: str) -> Dataset:
    """Return the images as a dataset with the column `image` alone."""
    images = part.select_columns(column)
    images = images.rename_column(column, "image") if column != "image" else images
    return images.cast_column("image", Image(decode=False))


def _image_sizes(images: Dataset) -> list[int]:
    """Return the size of each stored image in bytes, from Arrow's offsets alone; 0 if only a path is stored."""
    sizes: list[int] = []
    for batch in images.with_format("arrow").iter(1000):
        lengths = pc.binary_length(pc.struct_field(batch["image"], "bytes"))
        sizes += pc.fill_null(lengths, 0).to_pylist()
    return sizes


def _addressed_sizes(images: Dataset) -> list[int]:
    """Return the size of each image inside shards in bytes; of a parquet file on the Hub its own in place of them."""
    return [0 if address is None else image_size(address) for address in map(parse_address, image_paths(images))]


def _plain_columns(part: Dataset, contents: Contents) -> dict[str, Column]:
    """Return the columns of numbers, booleans, strings and classes, by their short names."""
    if VALUES in part.column_names:
        return archive_columns(part, contents)
    columns: dict[str, Column] = {}
    for (name, feature), own in zip(part.features.items(), short_names(part.column_names), strict=True):
        if isinstance(feature, ClassLabel):
            columns[own] = Column(_array(part, name), feature.names, declared=True)
        elif isinstance(feature, Value) and not feature.dtype.startswith(("binary", "large_binary")):
            columns[own] = Column(_array(part, name))
        elif not isinstance(feature, Image):
            contents.unused[f"column {own}"] = "lists or structures"
    return columns


def _array(part: Dataset, name: str) -> pa.Array:
    """Return a column as one array; of texts, which may be more than 2 GB in all, with 64-bit offsets."""
    column = part.select_columns(name).with_format("arrow")[:][name]
    column = column.cast(pa.large_string()) if pa.types.is_string(column.type) else column
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _joined(columns: list[dict[str, Column]], lengths: list[int]) -> dict[str, Column]:
    """Join the columns of the parts of a dataset; one that a part lacks is None there, classes are matched by name.

    Raises:
        ValueError: if one part declares the classes of a column and another does not.
    """
    joined: dict[str, Column] = {}
    for name in dict.fromkeys(name for part in columns for name in part):
        own = [part.get(name) for part in columns]
        labels = [column.labels for column in own if column is not None]
        if any(names is None for names in labels) and any(names is not None for names in labels):
            raise ValueError(f"column {name}: its classes have names in one split and none in another")
        union = None if labels[0] is None else list(dict.fromkeys(label for names in labels for label in names or []))
        parts = [
            [None] * length if column is None else _renumbered(column, union)
            for column, length in zip(own, lengths, strict=True)
        ]
        values = parts[0] if len(parts) == 1 else _concatenated(parts)
        declared = any(column is not None and column.declared for column in own)
        joined[name] = Column(values, union, declared=declared)
    return joined


def _renumbered(column: Column, union: list[str] | None) -> list[Any] | pa.Array:
    """Return the class ids of a column in the order of `union`; other values as they are."""
    if union is None or column.labels is None or column.labels == union:
        return column.values
    positions = {label: number for number, label in enumerate(union)}
    ids = {number: positions[label] for number, label in enumerate(column.labels)}
    values, rows = column.encode()
    renumbered = np.array([*(ids.get(value, -1) for value in values), -1])[rows]
    return pa.array(renumbered, mask=rows < 0)


def _concatenated(parts: list[list[Any] | pa.Array]) -> list[Any] | pa.Array:
    """Return the values of the parts of a dataset as one array, or as a list if they are of several types."""
    kinds = {part.type for part in parts if isinstance(part, pa.Array) and part.null_count < len(part)}
    if len(kinds) == 1 and all(isinstance(part, pa.Array) or not any(part) for part in parts):
        (kind,) = kinds
        arrays = [part.cast(kind) if isinstance(part, pa.Array) else pa.nulls(len(part), kind) for part in parts]
        return pa.concat_arrays(arrays)
    return [value for part in parts for value in (part.to_pylist() if isinstance(part, pa.Array) else part)]
