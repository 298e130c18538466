"""A latent cache on disk: opening, identity and upload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk

from ..data.image_folder import CACHE_INFO
from ..data.sources import Source
from ..data.transforms import Geometry
from ..storage import is_missing_or_empty, read_manifest
from ..upload import upload_folder
from .vae import VAE, weights_sha256

FORMAT_VERSION = 2


def open_latents(folder: str | Path) -> tuple[Dataset, dict[str, Any]]:
    """Open a latent cache: the data set, and what its `latents.json` says.

    Raises:
        ValueError: if the folder is no latent cache, or not whole.
    """
    folder = Path(folder)
    if not (folder / CACHE_INFO).is_file():
        raise ValueError(f"{folder} is no latent cache (no {CACHE_INFO}); make one with dit-hf prepare-latents")
    info = read_manifest(folder, CACHE_INFO)
    if info["identity"]["format"] != FORMAT_VERSION:
        raise ValueError(f"{folder} is a latent cache of format {info['identity']['format']}, not {FORMAT_VERSION}")
    return load_from_disk(str(folder)), info


def push_latents(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload a cache as it is, with its card, to the data set `repo_id` on the Hub; returns its address.

    Raises:
        ValueError: if the Hub does not take it, with its reason.
        OSError: if the Hub cannot be reached.
    """
    open_latents(folder)
    try:
        url = upload_folder(folder, repo_id, "dataset", "Upload a latent cache", private)
    except (ValueError, OSError) as error:
        raise type(error)(f"push_to_hub {error} (the cache in {folder} is whole)") from error
    print(f"{folder} is now {url}", flush=True)
    return url


def cache_identity(
    source: Source, vae: VAE, geometry: Geometry, flip: bool, settings: dict[str, Any]
) -> dict[str, Any]:
    """What two builds must have in common to be the same cache; each value can be shown to a person."""
    height, width = geometry.resolution or (0, 0)
    return {
        "format": FORMAT_VERSION,
        "source": f"{source.name}, {len(source.rows)} pictures ({source.sha256[:12]})",
        "vae": f"{settings['vae']} ({weights_sha256(vae)[:12]})",
        "crop": geometry.crop,
        "resolution": f"{height}x{width}",
        "flip": flip,
    }


def is_finished(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether `folder` holds this cache.

    Raises:
        FileExistsError: if it holds another one, or something else.
    """
    if is_missing_or_empty(folder):
        return False
    if not (folder / CACHE_INFO).is_file():
        raise FileExistsError(
            f"output_dir {folder} holds something else than a whole cache (no {CACHE_INFO}); name a new folder"
        )
    check_same_identity(
        read_manifest(folder, CACHE_INFO).get("identity", {}), identity, f"output_dir {folder} holds a cache"
    )
    return True


def check_same_identity(before: dict[str, Any], now: dict[str, Any], what: str) -> None:
    different = [f"{k} {before.get(k)}, now {v}" for k, v in now.items() if content(before.get(k)) != content(v)]
    if different:
        raise FileExistsError(f"{what} of {'; '.join(different)}; name a new folder")


def content(value: Any) -> Any:
    """What counts of a value of the identity: of `name (hash)` the hash, for one thing may be called by two names."""
    return value.rpartition("(")[2].rstrip(")") if isinstance(value, str) else value
