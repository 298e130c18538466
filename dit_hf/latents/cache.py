"""Latent caches on disk: opening, identity and upload."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk

from ..data.image_folder import CACHE_INFO
from ..data.sources import Source
from ..data.transforms import Geometry
from ..storage import folder_taken, is_missing_or_empty, read_manifest
from ..upload import upload_folder
from .vae import VAE, weights_sha256

FORMAT_VERSION = 2
# Format 2 spells parts of the identity as text; a name may itself hold commas, parentheses and line breaks.
_SOURCE_TEXT = re.compile(r"(?P<name>.*), (?P<num_images>\d+) pictures \((?P<sha256>\w+)\)", re.DOTALL)
_VAE_TEXT = re.compile(r"(?P<name>.*) \((?P<sha256>\w+)\)", re.DOTALL)
_RESOLUTION_TEXT = re.compile(r"(?P<height>\d+)x(?P<width>\d+)")


def open_latents(folder: str | Path) -> tuple[Dataset, dict[str, Any]]:
    """Open a latent cache.

    Returns:
        The rows, memory-mapped, and the content of `latents.json`; [`parse_identity`] reads the identity in it.

    Raises:
        ValueError: if the folder is not a latent cache, is incomplete, or has another format.
    """
    folder = Path(folder)
    if not (folder / CACHE_INFO).is_file():
        raise ValueError(f"{folder} is not a latent cache (no {CACHE_INFO}); make one with dit-hf prepare-latents")
    info = read_manifest(folder, CACHE_INFO)
    version = info["identity"]["format"]
    if version != FORMAT_VERSION:
        raise ValueError(f"{folder}: expected a latent cache of format {FORMAT_VERSION}, got format {version}")
    return load_from_disk(str(folder)), info


def push_latents(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload a cache with its card to the dataset `repo_id` on the Hub and return its URL.

    Raises:
        ValueError: if the folder is not a complete cache, or the Hub refuses it, with the reason.
        OSError: if the Hub cannot be reached.
    """
    open_latents(folder)
    try:
        url = upload_folder(folder, repo_id, "dataset", "Upload a latent cache", private)
    except (ValueError, OSError) as error:
        raise type(error)(f"push_to_hub {error} (the cache in {folder} is complete)") from error
    print(f"{folder} is now {url}", flush=True)
    return url


def cache_identity(source: Source, vae: VAE, geometry: Geometry, flip: bool) -> dict[str, Any]:
    """Return everything that two builds must share to make the same cache.

    Returns:
        `format`; `source` with name, number of images and SHA-256 of its rows; `vae` with name and SHA-256 of its
        weights; `crop`; `resolution` as (height, width) in pixels; `flip`. Hashes have 12 hexadecimal digits. Names
        are for messages alone: the same images or weights may be called by two names.
    """
    return {
        "format": FORMAT_VERSION,
        "source": {"name": source.name, "num_images": len(source.rows), "sha256": source.sha256[:12]},
        # `load_vae` sets the name (`_name_or_path` is private in diffusers 0.42.1).
        "vae": {"name": vae.config._name_or_path, "sha256": weights_sha256(vae)[:12]},
        "crop": geometry.crop,
        "resolution": geometry.resolution,
        "flip": flip,
    }


def format_identity(identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity as format 2 writes it into `latents.json` and `building/identity.json`."""
    source, vae = identity["source"], identity["vae"]
    height, width = identity["resolution"]
    return {
        **identity,
        "source": f"{source['name']}, {source['num_images']} pictures ({source['sha256']})",
        "vae": f"{vae['name']} ({vae['sha256']})",
        "resolution": f"{height}x{width}",
    }


def parse_identity(written: dict[str, Any]) -> dict[str, Any]:
    """Return the identity that `format_identity` wrote; one of another format is returned as it is.

    Raises:
        ValueError: naming the entry, if it is not spelled as format 2 spells it.
    """
    if written.get("format") != FORMAT_VERSION:
        return written
    source = _parse(_SOURCE_TEXT, "source", written)
    resolution = _parse(_RESOLUTION_TEXT, "resolution", written)
    return {
        **written,
        "source": {**source, "num_images": int(source["num_images"])},
        "vae": _parse(_VAE_TEXT, "vae", written),
        "resolution": (int(resolution["height"]), int(resolution["width"])),
    }


def _parse(pattern: re.Pattern[str], name: str, written: dict[str, Any]) -> dict[str, str]:
    """Return the named groups of an entry of a written identity."""
    match = pattern.fullmatch(str(written.get(name)))
    if match is None:
        raise ValueError(f"the identity of a latent cache has an unreadable {name}: {written.get(name)!r}")
    return match.groupdict()


def is_finished(folder: Path, identity: dict[str, Any]) -> bool:
    """Check whether `folder` holds the finished cache of this identity.

    Raises:
        FileExistsError: if it holds another cache, or something else.
    """
    place = f"output_dir {folder}"
    if is_missing_or_empty(folder):
        return False
    if not (folder / CACHE_INFO).is_file():
        raise FileExistsError(folder_taken(place, missing=CACHE_INFO))
    written = read_manifest(folder, CACHE_INFO).get("identity", {})
    check_same_identity(parse_identity(written), identity, place, "a cache")
    return True


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
    differences = [
        f"{name} {_describe(before.get(name))}, now {_describe(value)}"
        for name, value in now.items()
        if _comparable(before.get(name)) != _comparable(value)
    ]
    if differences:
        raise FileExistsError(folder_taken(place, f"holds {contents} of {'; '.join(differences)}"))


def _comparable(value: Any) -> Any:
    """Return the hash of a source or VAE, whatever its name, and any other entry as it is."""
    return value["sha256"] if isinstance(value, dict) else value


def _describe(value: Any) -> str:
    """Return an entry of an identity as messages show it, such as "avatars, 60 images (64b3bbef2596)"."""
    if isinstance(value, tuple):
        height, width = value
        return f"{height}x{width}"
    if isinstance(value, dict):
        count = f", {value['num_images']} images" if "num_images" in value else ""
        return f"{value['name']}{count} ({value['sha256']})"
    return str(value)
