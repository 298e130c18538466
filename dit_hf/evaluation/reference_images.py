"""Images to be turned into features, of any source or decoded from a latent cache, read by their rows' numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset

from ..data.image_folder import CACHE_INFO
from ..data.sources import AVATARS, MAX_LEFT_OUT, open_source
from ..data.transforms import Geometry, decode_image, parse_resolution
from ..latents.cache import content, open_latents
from ..latents.vae import VAE, decode, encode, load_vae


@dataclass(frozen=True)
class ReferenceImages:
    """Images of one size, of which each can be read again.

    Attributes:
        count: How many.
        facts: What they are, for a protocol; no path of this machine is among it.
        conditions: Ids of each condition by name, in the order of the rows.
        labels: Names of the values of those conditions that are classes.
        read: Rows to their images, uint8 [n, height, width, 3]; one that is broken raises ValueError.
    """

    count: int
    facts: dict[str, Any]
    conditions: dict[str, list[int]]
    labels: dict[str, list[str]]
    read: Callable[[Sequence[int]], np.ndarray]

    def read_whole(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The images of `rows` that can be read, perhaps none, and their rows."""
        with contextlib.suppress(ValueError):
            return self.read(rows), np.array(rows)
        height, width = (int(side) for side in self.facts["resolution"].split("x"))
        found, kept = [np.empty((0, height, width, 3), np.uint8)], []
        for row in rows:
            with contextlib.suppress(ValueError):  # counted by those who know how many there should be
                found.append(self.read([row]))
                kept.append(row)
        return np.concatenate(found), np.array(kept, np.int64)


def open_reference_images(
    source: str,
    resolution: str,
    crop: str = "center",
    split: str | None = None,
    num_images: int | None = None,
    seed: int = 0,
    dataset_config_name: str | None = None,
) -> ReferenceImages:
    """The images of any source, see [`dit_hf.open_images`], or those that the latents of a cache decode to.

    Raises:
        ValueError: for options that do not fit the source.
        FileNotFoundError: if there is no such source, or no image in it.
    """
    if (Path(source) / CACHE_INFO).is_file():
        return _decoded(source, split, num_images)
    geometry = Geometry(parse_resolution(resolution), crop)
    if geometry.resolution is None:
        raise ValueError("resolution is needed: the images of a reference have one size")
    opened = open_source(source, dataset_config_name, split, num_images, seed, max(geometry.resolution))
    rows = opened.rows
    height, width = geometry.resolution
    facts = {
        "source": opened.name,
        "pictures": len(rows),
        "sha256_of_rows": opened.sha256,
        "split": split,
        "crop": crop,
        "resolution": f"{height}x{width}",
        "resize": "PIL's antialiased bicubic",
    }

    def read(numbers: Sequence[int]) -> np.ndarray:
        return np.stack([np.asarray(decode_image(rows[int(number)], geometry)) for number in numbers])

    facts |= {"seed": seed} if source == AVATARS else {}
    conditions, features = _conditions(rows), rows.features
    labels = {name: features[name].names for name in conditions if isinstance(features[name], ClassLabel)}
    return ReferenceImages(len(rows), facts, conditions, labels, read)


def reconstructed(pictures: ReferenceImages, vae: VAE) -> Callable[[Sequence[int]], np.ndarray]:
    """Reads what a VAE makes of images: the decoded means of their latents."""

    def read(rows: Sequence[int]) -> np.ndarray:
        mean, _ = encode(vae, torch.from_numpy(pictures.read(rows)))
        return decode(vae, mean).cpu().numpy()

    return read


def check_left_out(pictures: ReferenceImages, rows: np.ndarray) -> None:
    """Refuse a set of which too much is missing; `rows` are those that could be read.

    Raises:
        ValueError: if more than 1 % of the images could not, with the reason of the first.
    """
    missing = sorted({*range(pictures.count)} - {*rows.tolist()})
    if len(missing) > MAX_LEFT_OUT * pictures.count:
        what = f"{len(missing)} of {pictures.count} images of {pictures.facts['source']} cannot be read"
        try:
            pictures.read(missing[:1])
        except ValueError as error:
            what = f"{what} ({error})"
        raise ValueError(f"{what}, more than {MAX_LEFT_OUT:.0%}")


def _decoded(folder: str, split: str | None, num_images: int | None) -> ReferenceImages:
    cache, info = open_latents(folder)
    chosen = np.array(cache["split"][:]) == split if split else np.ones(len(cache), bool)
    rows = cache.select(np.flatnonzero(chosen)[:num_images])
    if not len(rows):
        raise ValueError(f"split={split!r}: {folder} has no such images")
    vae, shape = load_vae(str(Path(folder) / "vae")), tuple(info["latent_shape"])
    facts = {
        "source": f"latents of {info['settings']['source']}, decoded",
        "pictures": len(rows),
        "sha256_of_rows": content(info["identity"]["source"]),
        "split": split,
        "crop": info["identity"]["crop"],
        "resolution": info["identity"]["resolution"],
        "vae_sha256": info["vae_sha256"],
    }

    def read(numbers: Sequence[int]) -> np.ndarray:
        latents = rows.select_columns("latent_mean")[np.array(numbers)]["latent_mean"]
        return decode(vae, torch.tensor(latents).view(-1, *shape)).cpu().numpy()

    conditions = {name: list(rows[name][:]) for name in info["conditions"]}
    return ReferenceImages(len(rows), facts, conditions, info["condition_labels"], read)


def _conditions(rows: Dataset) -> dict[str, list[int]]:
    names = [
        name
        for name, feature in rows.features.items()
        if name not in ("id", "image", "split") and (isinstance(feature, ClassLabel) or feature.dtype == "int8")
    ]
    return {name: list(rows[name][:]) for name in names}
