"""Load parquet, webdataset and Arrow shards where they are, by the splits that their names and folders name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, Features, concatenate_datasets, load_dataset
from datasets.table import CastError, table_cast

from ..pipelines.image_inputs import IMAGE_SUFFIXES
from ..storage import first_line, is_lfs_pointer
from .contents import Contents, SourceOptions, counted, image_count, shortened
from .files import Skipped, walk
from .parquet_shards import load_parquet
from .splits import split_named
from .stored_images import is_remote, open_parquet, open_shard
from .webdataset import SHARD, load_archives

LOADERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}  # names of them in `datasets`


def load_shards(path: Path, options: SourceOptions, contents: Contents) -> DatasetDict:
    """Load the shards of a file or folder; of several kinds, webdataset archives count more than the tables beside.

    Raises:
        ValueError: if a shard cannot be read, or the shards can be read in two ways.
    """
    skipped = Skipped()
    names = [""] if path.is_file() else [name for name, _ in walk(path, options, skipped)]
    skipped.describe(contents)
    by_suffix: dict[str, list[str]] = {}
    for name in names:
        by_suffix.setdefault(PurePosixPath(name or path.name).suffix.lower(), []).append(name)
    suffix = next(kind for kind in (".tar", ".parquet", ".arrow") if kind in by_suffix)
    contents.kind = {".tar": "webdataset", ".parquet": "parquet shards", ".arrow": "Arrow shards"}[suffix]
    others = {kind or "without a suffix": len(files) for kind, files in by_suffix.items() if kind != suffix}
    images = sum(others.pop(kind, 0) for kind in IMAGE_SUFFIXES)
    if images:
        contents.unused[f"{image_count(images)} beside the shards"] = "previews (name their folder to read them)"
    if others:
        contents.unused["files"] = counted(others)
    for name in by_suffix[suffix]:
        if is_lfs_pointer(path / name):
            raise ValueError(f"{path / name} is a pointer of git-lfs, not the shard: run git lfs pull")
    files = _files_by_split(by_suffix[suffix], options, contents)
    paths = {split: [str(path / name) for name in group] for split, group in files.items()}
    contents.addressed = suffix != ".arrow"
    if suffix == ".tar":
        return DatasetDict({split: load_archives(archives, options) for split, archives in paths.items()})
    load = load_parquet if suffix == ".parquet" else _map_arrow
    parts = {}
    try:
        # Each split for itself, since it may have numbered its classes by itself.
        for split, group in paths.items():
            _stored_classes(group)  # refuses shards that differ
            parts[split] = load(group)
    except Exception as error:  # of many classes
        raise ValueError(f"source {path}: {cause_of(error)}") from error
    return DatasetDict(parts)


def load_repository(
    kind: str,
    files: Mapping[str, Sequence[str]],
    features: Features | None,
    options: SourceOptions,
    contents: Contents,
) -> DatasetDict:
    """Load the shards of a dataset's repository, on this machine or on the Hub, without downloading the images.

    With `num_images`, only as many shards on the Hub are read as have so many.

    Args:
        kind: `parquet` or `webdataset`.
        files: Paths or URLs of the shards of each split.
        features: Features that the repository's card declares.
        options: How the source is to be read.
        contents: Receives a note of the shards that are not read.
    """
    parts, contents.addressed = {}, True
    for split, group in files.items():
        paths, most = [*group], None
        if options.num_images is not None and is_remote(paths[0]):
            most, order = options.num_images, np.random.default_rng([options.seed, 3]).permutation(len(paths))
            paths = [paths[number] for number in order]
            if kind == "parquet":
                paths = sorted(_first_shards(paths, most), key=group.index)
        parts[split] = load_parquet(paths, features) if kind == "parquet" else load_archives(paths, options, most)
        read = len(paths) if kind == "parquet" else len(set(parts[split][SHARD]))
        if read < len(group):
            contents.choices.append(f"--num_images reads {read:,} of the {len(group):,} shards of {split}")
    return with_stored_classes(DatasetDict(parts), files)


def _first_shards(paths: Sequence[str], most: int) -> list[str]:
    """Return the first parquet shards that have `most` rows together."""
    taken, count = [], 0
    for path in paths:
        taken.append(path)
        count += open_parquet(path, labels=True).metadata.num_rows
        if count >= most:
            break
    return taken


def _map_arrow(paths: Sequence[str]) -> Dataset:
    """Load Arrow shards: streams are read where they are, also by other processes; other formats are copied."""
    parts = []
    for path in paths:
        try:
            part = Dataset.from_file(path)
        except pa.ArrowInvalid:
            part = load_dataset("arrow", data_files=path, split="train")
        part.data.table.validate(full=True)  # offsets of a damaged file may lead outside of it
        parts.append(part)
    features = parts[0].features
    for number, part in enumerate(parts):
        if part.features != features:
            table_cast(part.data.table.slice(0, 0), features.arrow_schema)  # raises CastError for other columns
            parts[number] = part.cast(features)
    return concatenate_datasets(parts)


def _read_arrow_schema(file: Any) -> pa.Schema:
    """Return the schema of an Arrow shard in the format of streams or of files."""
    try:
        return pa.ipc.open_stream(file).schema
    except pa.ArrowInvalid:
        return pa.ipc.open_file(file).schema


def cause_of(error: Exception) -> str:
    """Return as one line what an error of `datasets` is about, which wraps those of its readers."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(cause, CastError):
        columns, expected = set(cause.table_column_names), set(cause.requested_column_names)
        if columns != expected:
            return (
                f"its shards differ in their columns ({', '.join(sorted(columns ^ expected))}): name one as the source"
            )
    return first_line(cause)


def with_stored_classes(loaded: DatasetDict, data_files: Mapping[str, Sequence[str]]) -> DatasetDict:
    """Return the splits of a repository with the names of classes that their own shards have.

    `datasets` gives all splits the names of the first one, although a split may have numbered its classes by itself.

    Args:
        loaded: The splits, as `datasets` loaded them.
        data_files: Paths or URLs of the files of each split; only parquet and Arrow shards store names of classes.

    Raises:
        ValueError: if the shards of a split differ in their classes.
    """
    has_classes = any(isinstance(f, ClassLabel) for part in loaded.values() for f in part.features.values())
    if len(loaded) > 1 and has_classes:
        for split, files in data_files.items():
            # Of shards elsewhere the first one of a split, because each costs a request.
            shards = [file for file in files if PurePosixPath(file).suffix in (".parquet", ".arrow")]
            for column, names in _stored_classes(shards[:1] if "://" in "".join(shards[:1]) else shards).items():
                if getattr(loaded[split].features.get(column), "names", names) != names:
                    loaded[split] = loaded[split].cast_column(column, ClassLabel(names=names))
    return loaded


def _stored_classes(shards: Sequence[str | Path]) -> dict[str, list[str]]:
    """Return the names of the classes in the shards of one split, by column.

    Raises:
        ValueError: naming two shards that number their classes differently, and the column.
    """
    first: dict[str, tuple[list[str], str]] = {}
    known = set()
    for shard in map(str, shards):
        if shard.lower().endswith(".parquet"):
            schema = open_parquet(shard, labels=True).schema_arrow
        else:
            with open_shard(shard) as file:
                schema = _read_arrow_schema(file)
        if (described := str(schema.metadata)) in known:  # cheaper than the features
            continue
        known.add(described)
        for column, feature in Features.from_arrow_schema(schema).items():
            if isinstance(feature, ClassLabel):
                names, earlier = first.setdefault(column, (feature.names, shard))
                if names != feature.names:
                    both = f"{PurePosixPath(earlier).name} and {PurePosixPath(shard).name}"
                    raise ValueError(f"{both} have different classes in column {column}")
    return {column: names for column, (names, _) in first.items()}


def _files_by_split(names: list[str], options: SourceOptions, contents: Contents) -> dict[str, list[str]]:
    """Return the shards of each split, which their names or folders name; all are `train` if none does.

    Raises:
        ValueError: if only some of them name a split, or one names two, and no option says what they are.
    """
    named = {name: _split_of_path(name, options) for name in names}
    if options.split_from == "none" or not any(named.values()):
        return {"train": names}
    unnamed = [name for name, split in named.items() if split is None]
    if unnamed and options.split_from is None:
        example = next(name for name, split in named.items() if split)
        raise ValueError(
            f"{example} is named like the {named[example]} split, {shortened(unnamed)} are named like none: "
            "--split_from files reads the latter as training images, --split_from none all of them"
        )
    contents.split_origin = "by file name"
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(named[name] or "train", []).append(name)
    return {split: files[split] for split in ("train", "validation", "test") if split in files}


def _split_of_path(name: str, options: SourceOptions) -> str | None:
    """Return the split that a file's name or, from the inside, one of its folders names.

    Raises:
        ValueError: if the two name different splits, and no option chooses.
    """
    path = PurePosixPath(name)
    by_name = split_named(path.stem)
    by_folder = next((split for part in reversed(path.parts[:-1]) if (split := split_named(part))), None)
    if by_name and by_folder and by_name != by_folder and options.split_from is None:
        raise ValueError(
            f"{name} is named like the {by_name} split and in a folder named like {by_folder}: --split_from files or "
            "folders chooses"
        )
    return (by_folder or by_name) if options.split_from == "folders" else (by_name or by_folder)
