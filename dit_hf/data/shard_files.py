"""Load the parquet, webdataset and Arrow shards of a folder, by the splits that their names and folders name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, DatasetDict, Features, load_dataset
from datasets.table import CastError

from ..pipelines.image_inputs import IMAGE_SUFFIXES
from ..storage import first_line, is_lfs_pointer
from .contents import Contents, SourceOptions, counted, image_count, shortened
from .files import Skipped, walk
from .splits import split_named
from .webdataset import load_archives

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
    if suffix == ".tar":
        archives = {split: [path / name for name in group] for split, group in files.items()}
        return DatasetDict({split: load_archives(paths, options) for split, paths in archives.items()})
    parts = {}
    try:
        # Each split for itself: `datasets` would read the classes of all splits by the names that the first one gives.
        for split, group in files.items():
            paths = [path / name for name in group]
            _stored_classes(paths)  # refuses shards that differ
            parts[split] = load_dataset(LOADERS[suffix], data_files={split: [*map(str, paths)]})[split]
    except Exception as error:  # of many classes
        raise ValueError(f"source {path}: {cause_of(error)}") from error
    return DatasetDict(parts)


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


def with_stored_classes(loaded: DatasetDict, data_files: Mapping[str, list[str]]) -> DatasetDict:
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
        with fsspec.open(shard) as file:
            schema = pq.read_schema(file) if shard.lower().endswith(".parquet") else pa.ipc.open_stream(file).schema
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
