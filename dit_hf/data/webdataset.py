"""Read webdataset archives: tar files in which the files of one name but for the suffix are one sample.

`datasets`' reader takes the columns of the first five samples for all of them, so that samples with another suffix of
image lose it, and stops at names that clash without naming them. This one reads each sample for itself.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from datasets import Dataset, Features, Image, Value

from ..pipelines.image_inputs import IMAGE_SUFFIXES
from ..storage import first_line, parse_json
from .contents import Column, Contents, SourceOptions, counted, short_names
from .files import is_system_file
from .folder_levels import classes_by_folder, reads_folders, splits_by_file_name, splits_by_folder
from .masks import check_masks
from .metadata import METADATA
from .splits import split_named
from .stored_images import Stamp, is_remote, open_shard, shard_version, tar_address

KEY, SHARD, VALUES = "__key__", "__shard__", "__values__"  # columns of a webdataset, as it is read here


@dataclass
class Sample:
    """A sample of an archive.

    Attributes:
        key: Path in the archive up to the first dot of the last part.
        shard: Name of the archive without its suffix.
        image: Offset and size in bytes of the image in the archive; None if the sample has none.
        image_name: Path of the image in the archive.
        values: Values of its `.json`, and `cls`, if it has them.
        excluded: Patterns of `--exclude`, one for each file that matches.
        others: Suffixes of the files that are not read, such as captions; the whole names of metadata files.
    """

    key: str
    shard: str
    image: tuple[int, int] | None = None
    image_name: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    excluded: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def read_archive(path: str, options: SourceOptions) -> Iterator[Sample]:
    """Yield the samples of an archive, whose files follow one another, without reading images.

    Args:
        path: Path or URL of the archive.
        options: The suffix of the images that are read, where samples have several, and the files to exclude.

    Raises:
        ValueError: naming the key of a sample with two images, or of two samples; or that the archive is broken.
    """
    sample: Sample | None = None
    seen: set[str] = set()
    try:
        # Without decompression, because images are read by their offsets.
        with open_shard(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                key, suffix = split_name(member.name)
                if not member.isfile() or suffix is None:
                    continue
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    if key in seen:
                        raise ValueError(f"{path}: two samples have the key {key!r}")
                    seen.add(key)
                    sample = Sample(key, PurePosixPath(path).stem)
                pattern = options.excluded_by(member.name.removeprefix("./"))
                if pattern is None:
                    _add(sample, suffix, member, archive, path, options.image_column)
                else:
                    sample.excluded.append(pattern)
    except tarfile.TarError as error:
        reason = first_line(error).removesuffix(":")
        raise ValueError(f"{path} cannot be read as a tar archive: {reason}") from error
    if sample is not None:
        yield sample


def split_name(name: str) -> tuple[str, str | None]:
    """Return key and suffix of a file: the last part of its path is divided at its first dot, as the format says."""
    name = name.removeprefix("./")
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    if not dot or any(map(is_system_file, name.split("/"))):
        return name, None
    return f"{folder}{slash}{stem}", suffix


def _add(
    sample: Sample,
    suffix: str,
    member: tarfile.TarInfo,
    archive: tarfile.TarFile,
    path: str,
    image_column: str | None,
) -> None:
    """Add a file of the archive to its sample."""
    last = "." + suffix.rpartition(".")[2].lower()
    if last in IMAGE_SUFFIXES and image_column in (None, suffix):
        if sample.image is not None:
            choice = f"--image_column {split_name(sample.image_name)[1]} or --image_column {suffix} reads one of them"
            raise ValueError(
                f"{path}: the key {sample.key!r} has two images, {sample.image_name} and {member.name}; a key ends at "
                f"the first dot of a file's name ({choice})"
            )
        if member.sparse is not None:
            raise ValueError(f"{path}: {member.name} is stored with holes; pack the archive without --sparse")
        sample.image, sample.image_name = (member.offset_data, member.size), member.name
    elif member.name.rpartition("/")[2] in METADATA:
        sample.others.append(member.name.rpartition("/")[2])
    elif last == ".json":
        try:
            values = parse_json(_content(archive, member))
        except ValueError as error:
            raise ValueError(f"{path}: {member.name} is not JSON: {error}") from error
        sample.values |= values if isinstance(values, dict) else {suffix: values}
    elif last in (".cls", ".cls2"):
        sample.values[suffix.lower()] = _content(archive, member).decode().strip()
    else:
        sample.others.append(f".{suffix}")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return b"" if file is None else file.read()


def load_archives(paths: Sequence[str], options: SourceOptions, most: int | None = None) -> Dataset:
    """Load webdataset archives: key, shard, image and, as JSON, the other values of each sample.

    Args:
        paths: Paths or URLs of the archives.
        options: What is read of them.
        most: Stop after the archive in which so many images were reached; None reads all.
    """
    features = {name: Value("string") for name in (KEY, SHARD, VALUES)} | {"image": Image()}
    # `datasets` keeps the result by its arguments: with size and time of the archives it is as new as they are.
    paths = [path if is_remote(path) else os.path.abspath(path) for path in paths]
    versions = [shard_version(path) for path in paths]
    # Of the options those that decide what is read, so that others find it again.
    own = SourceOptions(image_column=options.image_column, exclude=options.exclude)
    # As tuples, because `datasets` would take lists apart and call the reader for each archive.
    arguments = {"paths": tuple(paths), "versions": tuple(versions), "options": own, "most": most}
    try:
        return Dataset.from_generator(_archive_rows, features=Features(features), gen_kwargs=arguments)
    except Exception as error:  # datasets wraps the reader's own errors
        if "corresponds to no data" in str(error):
            raise ValueError(
                f"{paths[0]}: no samples in this archive{' and the others' if paths[1:] else ''}"
            ) from error
        cause = error.__cause__
        raise ValueError(first_line(cause if isinstance(cause, Exception) else error)) from error


def _archive_rows(
    paths: tuple[str, ...], versions: tuple[Stamp, ...], options: SourceOptions, most: int | None
) -> Iterator[dict[str, Any]]:
    count = 0
    for path in paths:
        for sample in read_archive(path, options):
            count += sample.image is not None
            image = None
            if sample.image is not None:
                suffix = PurePosixPath(sample.image_name).suffix.lower()
                image = {"bytes": None, "path": tar_address(path, *sample.image, suffix)}
            is_sample = image is not None or bool(sample.values)
            counted_files = {"others": sample.others, "excluded": sample.excluded}
            values = json.dumps({"values": sample.values, "is_sample": is_sample, **counted_files})
            yield {KEY: sample.key, SHARD: sample.shard, VALUES: values, "image": image}
        if most is not None and count >= most:
            return


def archive_columns(part: Dataset, contents: Contents) -> dict[str, Column]:
    """Return the columns of a webdataset's JSON and class files; a sample without one is None there."""
    samples = [json.loads(values) for values in part[VALUES]]
    contents.excluded += Counter(pattern for sample in samples for pattern in sample["excluded"])
    others = Counter(suffix for sample in samples for suffix in sample["others"])
    for name in METADATA:
        if others.pop(name, 0):
            contents.unused[f"{name} in an archive"] = "lists are read beside unpacked images: unpack the archive"
    if others:
        contents.unused["files in the archives"] = counted(others)
    rows = [dict(_leaves(sample["values"])) for sample in samples]
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name, own in zip(names, short_names(names), strict=True):
        values = [row.get(name) for row in rows]
        if any(isinstance(value, list) for value in values):
            contents.unused[f"column {own}"] = "lists or structures"
        else:
            columns[own] = Column(values, declared=name == "cls")
    return columns


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dicts with their names, joined by dots."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def read_folders_inside(source: str, parts: dict[str, Dataset], options: SourceOptions, contents: Contents) -> None:
    """Read splits and classes from the folders inside archives, as from those of a folder of images.

    Raises:
        ValueError: if they can be read in two ways, or contradict the names of the archives.
    """
    # Files that are neither image nor values of one are no samples.
    samples = [json.loads(values) for part in parts.values() for values in part[VALUES]]
    keys = [key for part in parts.values() for key in part[KEY]]
    kept = [row for row, sample in enumerate(samples) if sample["is_sample"]]
    contents.keep(kept)
    keys = [keys[row] for row in kept]
    if not any(contents.sizes):
        wanted = f"--image_column {options.image_column}: " if options.image_column else ""
        raise ValueError(f"{wanted}source {source}: no images of that kind in its archives")
    check_masks(source, keys, options)

    # Splits, which both the names of archives and the folders in them may name.
    parents, origin = {key.rpartition("/")[0] for key in keys}, contents.split_origin
    splits: list[str | None] = []
    if options.split_from == "folders" or any(split_named(part) for parent in parents for part in parent.split("/")):
        splits = splits_by_folder(keys, options, contents)
    if not (splits or origin):
        splits = splits_by_file_name(keys, options, contents)
    if splits and origin and options.split_from is None:
        _check_same_splits(splits, contents)
    elif splits:
        keys = [keys[row] for row in contents.keep_splits(splits)]

    # Classes, unless the samples have values of their own.
    if not contents.columns or reads_folders(options):
        contents.columns |= classes_by_folder(keys, options, contents)
    elif len(parents) > 1:
        contents.unused["names of folders in the archives"] = "samples have values (--conditions class reads folders)"


def _check_same_splits(inside: list[str | None], contents: Contents) -> None:
    """Refuse folders in an archive that name another split than the archive.

    Raises:
        ValueError: naming the first image in one.
    """
    for image_id, split, by_archive in zip(contents.ids, inside, contents.splits or [], strict=True):
        if split not in (None, by_archive):
            raise ValueError(
                f"{image_id} is in a folder of the {split} split and in an archive of the {by_archive} split: "
                "--split_from folders or files chooses"
            )
