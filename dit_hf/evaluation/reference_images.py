"""Reference images: any source of images, or the decoded latents of a cache, read by row number."""

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
from ..latents.cache import content_sha256, open_latents, parse_identity
from ..latents.vae import VAE, decode, encode, load_vae


@dataclass(frozen=True)
class ReferenceImages:
    """Images of one size that can be read by row number, again and again.

    Attributes:
        count: Number of images.
        summary: Description of the images for the protocol; contains no path of this machine. Its keys are hashed into
            the identity of statistics.
        conditions: Ids of each condition by name, in the order of the rows.
        labels: Value names of those conditions that are classes.
        read: Reads rows as images, uint8 [n, height, width, 3]; raises ValueError if one is broken.
    """

    count: int
    summary: dict[str, Any]
    conditions: dict[str, list[int]]
    labels: dict[str, list[str]]
    read: Callable[[Sequence[int]], np.ndarray]

    def read_intact(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Read those of `rows` that are not broken.

        Returns:
            The images, uint8 [n, height, width, 3], and their rows, int64 [n]; n may be 0.
        """
        with contextlib.suppress(ValueError):
            return self.read(rows), np.array(rows)
        # At least one is broken: read one by one to find out which. `check_left_out` counts the missing ones later.
        height, width = (int(side) for side in self.summary["resolution"].split("x"))
        images, intact_rows = [np.empty((0, height, width, 3), np.uint8)], []
        for row in rows:
            with contextlib.suppress(ValueError):
                images.append(self.read([row]))
                intact_rows.append(row)
        return np.concatenate(images), np.array(intact_rows, np.int64)


def open_reference_images(
    source: str,
    resolution: str,
    crop: str = "center",
    split: str | None = None,
    num_images: int | None = None,
    seed: int = 0,
    dataset_config_name: str | None = None,
) -> ReferenceImages:
    """Open the images of any source, see [`dit_hf.open_images`], or the decoded latents of a cache.

    Args:
        source: Source of images, or the folder of a latent cache.
        resolution: `N` or `HxW` pixels; ignored for a cache, which has its own.
        crop: Crop before the resize; ignored for a cache.
        split: Only this split of a source that has several.
        num_images: Only the first so many images.
        seed: Seed of the avatars.
        dataset_config_name: Configuration of a data set on the Hub.

    Raises:
        ValueError: for options that do not fit the source.
        FileNotFoundError: if the source does not exist or holds no images.
    """
    if (Path(source) / CACHE_INFO).is_file():
        return _open_decoded(source, split, num_images)
    geometry = Geometry(parse_resolution(resolution), crop)
    if geometry.resolution is None:
        raise ValueError("resolution is needed: the images of a reference have one size")
    opened = open_source(source, dataset_config_name, split, num_images, seed, max(geometry.resolution))
    rows = opened.rows
    height, width = geometry.resolution
    # Keys and values are part of the statistics' identity: a change would make earlier statistics look different.
    summary = {
        "source": opened.name,
        "pictures": len(rows),
        "sha256_of_rows": opened.sha256,
        "split": split,
        "crop": crop,
        "resolution": f"{height}x{width}",
        "resize": "PIL's antialiased bicubic",
    }
    if source == AVATARS:
        summary["seed"] = seed

    def read(numbers: Sequence[int]) -> np.ndarray:
        return np.stack([np.asarray(decode_image(rows[int(number)], geometry)) for number in numbers])

    conditions, features = _read_conditions(rows), rows.features
    labels = {name: features[name].names for name in conditions if isinstance(features[name], ClassLabel)}
    return ReferenceImages(len(rows), summary, conditions, labels, read)


def reconstruction_reader(images: ReferenceImages, vae: VAE) -> Callable[[Sequence[int]], np.ndarray]:
    """Return a function that reads rows as the VAE reconstructs them: encoded, and the posterior's mean decoded."""

    def read(rows: Sequence[int]) -> np.ndarray:
        mean, _ = encode(vae, torch.from_numpy(images.read(rows)))  # [n, channels, height / factor, width / factor]
        return decode(vae, mean).cpu().numpy()  # uint8 [n, height, width, 3]

    return read


def check_left_out(images: ReferenceImages, rows: np.ndarray) -> None:
    """Refuse a reference with too many broken images; `rows` are the readable ones.

    Raises:
        ValueError: if more than 1 % of the images cannot be read, with the first one's error.
    """
    missing = sorted({*range(images.count)} - {*rows.tolist()})
    if len(missing) <= MAX_LEFT_OUT * images.count:
        return
    problem = f"{len(missing)} of {images.count} images of {images.summary['source']} cannot be read"
    # Read one of them again for its error message.
    try:
        images.read(missing[:1])
    except ValueError as error:
        problem = f"{problem} ({error})"
    raise ValueError(f"{problem}, more than {MAX_LEFT_OUT:.0%}")


def _open_decoded(folder: str, split: str | None, num_images: int | None) -> ReferenceImages:
    """Open the latents of a cache as images, decoded with the cache's own VAE."""
    cache, info = open_latents(folder)
    selected = np.array(cache["split"][:]) == split if split else np.ones(len(cache), bool)
    rows = cache.select(np.flatnonzero(selected)[:num_images])
    if not len(rows):
        raise ValueError(f"split={split!r}: {folder} has no such images")
    vae, shape = load_vae(str(Path(folder) / "vae")), tuple(info["latent_shape"])
    resolution = parse_identity(info["identity"])["resolution"]
    # Part of the statistics' identity, as in `open_reference_images`.
    summary = {
        "source": f"latents of {info['settings']['source']}, decoded",
        "pictures": len(rows),
        "sha256_of_rows": content_sha256(info),
        "split": split,
        "crop": info["identity"]["crop"],
        "resolution": f"{resolution['height']}x{resolution['width']}",
        "vae_sha256": info["vae_sha256"],
    }

    def read(numbers: Sequence[int]) -> np.ndarray:
        latents = rows.select_columns("latent_mean")[np.array(numbers)]["latent_mean"]
        return decode(vae, torch.tensor(latents).view(-1, *shape)).cpu().numpy()  # uint8 [n, height, width, 3]

    conditions = {name: list(rows[name][:]) for name in info["conditions"]}
    return ReferenceImages(len(rows), summary, conditions, info["condition_labels"], read)


def _read_conditions(rows: Dataset) -> dict[str, list[int]]:
    """Return the ids of the columns that are conditions: classes, and yes/no attributes as int8."""
    names = [
        name
        for name, feature in rows.features.items()
        if name not in ("id", "image", "split") and (isinstance(feature, ClassLabel) or feature.dtype == "int8")
    ]
    return {name: list(rows[name][:]) for name in names}
