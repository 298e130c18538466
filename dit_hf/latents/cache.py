"""Latent caches on disk: opening, identity and upload."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features

from ..data.files import CACHE_INFO
from ..data.photographs import faces_identity
from ..data.sources import Source
from ..data.transforms import DECODING_VERSION, Geometry
from ..storage import check_own_folder, folder_taken, is_missing_or_empty, read_manifest
from ..upload import Content, Repository, upload_folder
from .reuse import SOURCE_FILES
from .shards import load_rows
from .vae import VAE, load_vae, weights_sha256

# The owner's to change: nothing reads them.
EDITABLE = ("README.md", "left_out.csv", "reconstructions.png", "faces.png")
NOT_PUSHED = (SOURCE_FILES, "left_out.csv")
_SHARD_FILE = re.compile(r"data-\d{5}-of-\d{5}\.arrow")
_OBJECTS = ("identity", "settings", "conditions", "condition_labels", "statistics")
_KEYS = (*_OBJECTS, "latent_shape", "vae_sha256")
FORMAT_VERSION = 3
EARLIER_FORMAT = 2  # of version 0.1.0: without the hashes of the images
GROWN = "grown"  # the key of what a cache remembers of those that it grew from
# Format 2 spells parts of the identity as text; a name may itself hold commas, parentheses and line breaks.
_SOURCE_TEXT = re.compile(r"(?P<name>.*), (?P<num_images>\d+) pictures \((?P<sha256>\w+)\)", re.DOTALL)
_VAE_TEXT = re.compile(r"(?P<name>.*) \((?P<sha256>\w+)\)", re.DOTALL)
_RESOLUTION_TEXT = re.compile(r"(?P<height>\d+)x(?P<width>\d+)")


def read_cache_info(folder: str | Path, hashes: bool | str = False) -> dict[str, Any]:
    """Return the content of a cache's `latents.json`; [`parse_identity`] reads the identity in it.

    Args:
        folder: The cache.
        hashes: Which large files are compared by content, see [`read_manifest`]; the others are by their sizes.

    Raises:
        ValueError: if the folder is not a latent cache, is incomplete or damaged, or has another format.
    """
    folder = Path(folder)
    if not (folder / CACHE_INFO).is_file():
        there = f"no {CACHE_INFO} in it" if folder.is_dir() else f"no such folder in {Path.cwd()}"
        inside = sorted(path.parent for path in folder.glob(f"*/{CACHE_INFO}"))
        advice = f"did you mean {inside[0]}?" if inside else "make one with dit-hf prepare-latents"
        raise ValueError(f"{folder} is not a latent cache ({there}); {advice}")
    remedy = f"delete {folder} and make it again"
    info = read_manifest(folder, CACHE_INFO, hashes, EDITABLE, remedy, _KEYS)
    for key in _OBJECTS:
        if not isinstance(info[key], dict):
            raise ValueError(f"{folder / CACHE_INFO} is damaged ({key} is not an object); {remedy}")
    version = info["identity"].get("format")
    if version not in (EARLIER_FORMAT, FORMAT_VERSION):
        raise ValueError(f"{folder}: expected a latent cache of format {FORMAT_VERSION}, got format {version}")
    return info


def load_cache_vae(folder: str | Path, device: str | torch.device | None = None) -> VAE:
    """Load the VAE of a latent cache, in float32.

    Raises:
        ValueError: if it is damaged.
    """
    read_cache_info(folder, hashes="vae")
    return load_vae(str(Path(folder) / "vae"), device)


def open_latents(folder: str | Path, hashes: bool | str = False) -> tuple[Dataset, dict[str, Any]]:
    """Open a latent cache; see [`read_cache_info`] for the arguments.

    Returns:
        The rows, memory-mapped, and what [`read_cache_info`] returns.

    Raises:
        ValueError: if the folder is not a latent cache, is incomplete or damaged, or has another format.
    """
    info = read_cache_info(folder, hashes)
    return load_rows(Path(folder)), info


def content_sha256(info: dict[str, Any]) -> str:
    """Return the hash of a cache's images and labels, 12 digits; of names, sizes and labels alone in format 2."""
    return info["content_sha256"] if "content_sha256" in info else parse_identity(info["identity"])["source"]["sha256"]


def holds_out(info: dict[str, Any]) -> bool:
    """Check whether 2 % of a cache's training images are validation images, because its first source had none."""
    return info[GROWN]["hold_out"] if GROWN in info else "validation" not in info["plan"]["images"]


def earlier_contents(info: dict[str, Any]) -> list[str]:
    """Return the `content_sha256` of each cache that a cache has grown from, the latest first."""
    return info.get(GROWN, {"from": []})["from"]


def push_latents(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload a cache with its card to the dataset `repo_id` on the Hub and return its URL.

    The list of images that were left out stays here: it holds paths alone.

    Raises:
        ValueError: if the folder is not a complete cache, or the Hub refuses it, with the reason.
        OSError: if the Hub cannot be reached.
    """
    read_cache_info(folder, hashes=True)
    print(
        f"uploading {folder}: its ids are the images' paths, unless it was made with --anonymous_ids",
        flush=True,
    )
    try:
        url = upload_folder(folder, repo_id, _CONTENT, private)
    except (ValueError, OSError) as error:
        raise type(error)(f"push_to_hub {error} (the cache in {folder} is complete)") from error
    print(f"{folder} is now {url}", flush=True)
    return url


def _check_repository(repository: Repository) -> None:
    """Refuse a data set that is no latent cache.

    Raises:
        FileExistsError: if it is none.
    """
    if CACHE_INFO not in repository.files:
        there = ", ".join(sorted(repository.files - {".gitattributes"})[:3])
        raise FileExistsError(f"{repository.repo_id} holds something else already ({there}); name another repository")


_CONTENT = Content(
    repo_type="dataset",
    commit_message="Upload a latent cache",
    check=_check_repository,
    is_ours=lambda name: _SHARD_FILE.fullmatch(name) is not None,
    metadata=("configs",),  # which name the shards
    ignore_patterns=NOT_PUSHED,
)


@dataclass(frozen=True)
class Base:
    """Finished cache that images are added to.

    Attributes:
        folder: The cache.
        info: The content of its `latents.json`.
        files: The names of its shards, in order.
        features: Features of the grown cache: those of this one, with names of new classes at the end.
        kept: Its rows that the grown cache keeps, bool [rows].
        stamps: Stamps of the images of these rows as they are in the source now, int64 [kept rows, 3]; see `reuse.py`.
        images: All rows of the source, those of images that this cache has too.
        ids: Ids of these images in the grown cache, which do not change if a file is renamed.
    """

    folder: Path
    info: dict[str, Any]
    files: list[str]
    features: Features
    kept: np.ndarray
    stamps: np.ndarray
    images: Dataset
    ids: list[str]


@dataclass(frozen=True)
class Part:
    """One of several parts of a cache that are built apart: `number`, from 1, `of` so many."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True)
class CacheSpec:
    """Cache to build.

    Attributes:
        source: The images to encode: all that were opened, those of a part, or those that `base` does not have.
        vae: The VAE that encodes them.
        geometry: Crop and resolution; the resolution is set.
        flip: Whether each image is encoded mirrored too.
        max_left_out: The share of images that may be left out.
        batch_size: Images that the VAE encodes at once; None chooses by their size.
        settings: Options of `prepare_latents` that `latents.json` and the card quote.
        identity: See [`cache_identity`].
        hold_out: Whether 2 % of the training images become validation images, because the source has none.
        base: The cache that the images are added to.
        part: The part of a cache that is built.
    """

    source: Source
    vae: VAE
    geometry: Geometry
    flip: bool
    max_left_out: float
    batch_size: int | None
    settings: dict[str, Any]
    identity: dict[str, Any]
    hold_out: bool
    base: Base | None = None
    part: Part | None = None

    @property
    def num_images(self) -> int:
        """Number of images of which a share may be left out: an addition tries those again that `base` left out."""
        return len(self.source.rows if self.base is None else self.base.images)

    @property
    def num_planned(self) -> int:
        """Number of images by which shards are planned: those of the whole cache for a part of it."""
        return self.identity["source"]["num_images"] if self.part else len(self.source.rows)

    def identity_as(self, version: int) -> dict[str, Any]:
        """Return the identity of this cache in a format."""
        return earlier_identity(self.identity, self.source) if version == EARLIER_FORMAT else self.identity


def cache_identity(source: Source, vae: VAE, geometry: Geometry, flip: bool) -> dict[str, Any]:
    """Return everything that two builds must share to make the same cache, but for the content of the images.

    Returns:
        `format`; `source` with name, number of images and SHA-256 of their ids; `labels` with the SHA-256 of each
        column; what [`encoding_identity`] returns. Hashes have 12 hexadecimal digits. Names are for messages alone:
        the same images or weights may be called by two names. A part has also `part`, and a cache that has grown
        `added_to`, the `content_sha256` of the one before.
    """
    columns = {name: _column_sha256(source.rows, name) for name in source.rows.column_names if name != "image"}
    ids = columns.pop("id")
    return {
        "format": FORMAT_VERSION,
        "source": {"name": source.name, "num_images": len(source.rows), "sha256": ids},
        "labels": columns,
        **encoding_identity(vae, geometry, flip),
    }


def encoding_identity(vae: VAE | None, geometry: Geometry, flip: bool) -> dict[str, Any]:
    """Return what makes latents of an image.

    Returns:
        `vae` with name and SHA-256 of its weights, unless it is None; `preprocessing`; `crop`; `resolution` with
        height and width in pixels; `flip`; with crop `face` also `faces`.
    """
    assert geometry.resolution is not None  # `prepare_latents` refuses None
    height, width = geometry.resolution
    # `load_vae` sets the name (`_name_or_path` is private in diffusers 0.42.1).
    named = {} if vae is None else {"name": vae.config._name_or_path, "sha256": weights_sha256(vae)[:12]}
    return {
        **({"vae": named} if named else {}),
        "preprocessing": DECODING_VERSION,
        "crop": geometry.crop,
        "resolution": {"height": height, "width": width},
        "flip": flip,
        **({"faces": faces_identity(geometry)} if geometry.crop == "face" else {}),
    }


def earlier_identity(identity: dict[str, Any], source: Source) -> dict[str, Any]:
    """Return an identity as format 2 has it: one hash of ids, sizes and labels, without the names of classes."""
    kept = {name: value for name, value in identity.items() if name not in ("labels", "preprocessing")}
    source_identity = {**identity["source"], "sha256": source.sha256[:12]}
    return {**kept, "format": EARLIER_FORMAT, "source": source_identity}


def _column_sha256(rows: Dataset, name: str) -> str:
    """Return the hash of a column: its values and, if it has classes, their names."""
    digest = hashlib.sha256(json.dumps(getattr(rows.features[name], "names", None)).encode())
    for table in rows.select_columns(name).with_format("arrow").iter(100_000):
        column = table.column(name)
        if pa.types.is_integer(column.type):  # much faster than as text
            values = pc.fill_null(column.cast(pa.int64()), -(2**63)).to_numpy()
            digest.update(values.astype("<i8").tobytes())
        else:
            digest.update(json.dumps(column.to_pylist()).encode())
    return digest.hexdigest()[:12]


def format_identity(identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity as it is written into `latents.json` and `building/identity.json`.

    Format 2 spells some entries as text, format 3 none.
    """
    if identity["format"] != EARLIER_FORMAT:
        return identity
    source, vae, resolution = identity["source"], identity["vae"], identity["resolution"]
    return {
        **identity,
        "source": f"{source['name']}, {source['num_images']} pictures ({source['sha256']})",
        "vae": f"{vae['name']} ({vae['sha256']})",
        "resolution": f"{resolution['height']}x{resolution['width']}",
    }


def parse_identity(written: dict[str, Any]) -> dict[str, Any]:
    """Return the identity that `format_identity` wrote.

    Raises:
        ValueError: naming the entry, if it is not spelled as format 2 spells it.
    """
    if written.get("format") != EARLIER_FORMAT:
        return written
    source = _parse(_SOURCE_TEXT, "source", written)
    resolution = _parse(_RESOLUTION_TEXT, "resolution", written)
    return {
        **written,
        "source": {**source, "num_images": int(source["num_images"])},
        "vae": _parse(_VAE_TEXT, "vae", written),
        "resolution": {side: int(length) for side, length in resolution.items()},
    }


def _parse(pattern: re.Pattern[str], name: str, written: dict[str, Any]) -> dict[str, str]:
    """Return the named groups of an entry of a written identity."""
    match = pattern.fullmatch(str(written.get(name)))
    if match is None:
        raise ValueError(f"the identity of a latent cache has an unreadable {name}: {written.get(name)!r}")
    return match.groupdict()


def finished_identity(folder: Path, verify: bool) -> dict[str, Any] | None:
    """Return the identity of the finished cache in `folder`; None if there is nothing.

    Args:
        folder: Where a cache is to be made.
        verify: Compare the hashes of all files with those that were recorded.

    Raises:
        FileExistsError: if it holds something else.
        ValueError: if it is damaged.
    """
    check_own_folder(folder, CACHE_INFO)
    if is_missing_or_empty(folder):
        return None
    return parse_identity(read_cache_info(folder, hashes=verify)["identity"])


def check_same_identity(before: dict[str, Any], now: dict[str, Any], place: str, contents: str) -> None:
    """Refuse to build a cache where another one is.

    Args:
        before: Identity of the cache that exists.
        now: Identity of the cache to build.
        place: Where it exists, for the error.
        contents: "a cache" or "an unfinished cache", for the error.

    Raises:
        FileExistsError: listing every entry that differs, before and now.
    """
    differences = identity_differences(before, now)
    if differences:
        raise FileExistsError(folder_taken(place, f"holds {contents} of other settings: {'; '.join(differences)}"))


def identity_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a sentence for each entry of two identities that differs; for their labels, if nothing else does."""
    differences = [
        f"{name} was {_describe(before.get(name))} and is {_describe(now.get(name))}"
        for name in {**now, **before}
        if name != "labels" and _comparable(before.get(name)) != _comparable(now.get(name))
    ]
    # Hashes of labels say nothing to a reader: the columns are named. Other images have other labels anyway.
    labels_before, labels_now = before.get("labels", {}), now.get("labels", {})
    columns = sorted(labels_before.keys() | labels_now.keys())
    changed = [name for name in columns if labels_before.get(name) != labels_now.get(name)]
    if changed and not differences:
        named = ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else "")
        differences = [f"labels ({named}: values or names of classes have changed since)"]
    return differences


def _comparable(value: Any) -> Any:
    """Return the hash of a source or VAE, whatever its name, and any other entry as it is."""
    return value["sha256"] if isinstance(value, dict) and "sha256" in value else value


def _describe(value: Any) -> str:
    """Return an entry of an identity as messages show it, such as "avatars, 60 images (64b3bbef2596)"."""
    if isinstance(value, dict) and "height" in value:
        return f"{value['height']}x{value['width']}"
    if isinstance(value, dict):
        count = f", {value['num_images']} images" if "num_images" in value else ""
        return f"{value['name']}{count} ({value['sha256']})"
    return str(value)
