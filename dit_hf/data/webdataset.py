"""Read webdataset archives: tar files in which the files of one name but for the suffix are one sample.

`datasets`' reader takes the columns of the first five samples for all of them, so that samples with another suffix of
image lose it, and stops at names that clash without naming them. This one reads each sample for itself.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..pipelines.image_inputs import IMAGE_SUFFIXES


@dataclass
class Sample:
    """A sample of an archive.

    Attributes:
        key: Path in the archive up to the first dot of the last part.
        shard: Name of the archive without its suffix.
        image: The stored image; None if the sample has none.
        image_name: Path of the image in the archive.
        values: Values of its `.json`, and `cls`, if it has them.
        others: Suffixes of the files that are not read, such as captions.
    """

    key: str
    shard: str
    image: bytes | None = None
    image_name: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def read_archive(path: Path) -> Iterator[Sample]:
    """Yield the samples of an archive, whose files follow one another.

    Raises:
        ValueError: naming the key of a sample with two images, or of two samples; or that the archive is broken.
    """
    sample: Sample | None = None
    seen: set[str] = set()
    try:
        with tarfile.open(path) as archive:
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
                    sample = Sample(key, path.stem)
                _add(sample, suffix, member, archive, path)
    except tarfile.TarError as error:
        raise ValueError(f"{path} cannot be read as a tar archive: {error}") from error
    if sample is not None:
        yield sample


def split_name(name: str) -> tuple[str, str | None]:
    """Return key and suffix of a file: the last part of its path is divided at its first dot, as the format says."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, dot, suffix = last.partition(".")
    if not stem or not dot or last.startswith("._"):  # hidden, or half of a Macintosh file
        return name, None
    return f"{folder}{slash}{stem}", suffix


def _add(sample: Sample, suffix: str, member: tarfile.TarInfo, archive: tarfile.TarFile, path: Path) -> None:
    """Add a file of the archive to its sample."""
    last = "." + suffix.rpartition(".")[2].lower()
    if last in IMAGE_SUFFIXES:
        if sample.image is not None:
            raise ValueError(
                f"{path}: the key {sample.key!r} has two images, {sample.image_name} and {member.name}; a key ends at "
                "the first dot of a file's name"
            )
        sample.image, sample.image_name = _content(archive, member), member.name
    elif last == ".json":
        values = json.loads(_content(archive, member))
        sample.values |= values if isinstance(values, dict) else {suffix: values}
    elif last in (".cls", ".cls2"):
        sample.values[suffix.lower()] = _content(archive, member).decode().strip()
    else:
        sample.others.append(f".{suffix}")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return b"" if file is None else file.read()
