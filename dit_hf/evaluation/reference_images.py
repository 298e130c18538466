"""Reference images: any source of images, or the decoded latents of a cache, read by row number."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset

from ..data.contents import SourceOptions, condition_names
from ..data.files import CACHE_INFO
from ..data.parallel import map_rows
from ..data.photographs import open_faces
from ..data.shared_source import open_on_first_rank
from ..data.sources import AVATARS, MAX_LEFT_OUT, open_source
from ..data.stored_images import NO_STAMP, image_stamp, stored_bytes, with_bytes
from ..data.transforms import Geometry, decode_image, parse_resolution
from ..latents.cache import content_sha256, open_latents, parse_identity, read_cache_info
from ..latents.vae import VAE, decode, encode, load_vae
from ..runs import RunFolder, find_run, read_run_config


@dataclass(frozen=True)
class ReferenceImages:
    """Images of one size that can be read by row number, again and again.

    Attributes:
        count: Number of images.
        summary: Description of the images for the protocol; contains no path of this machine. Its keys are hashed into
            the identity of statistics.
        conditions: Ids of each condition by name, in the order of the rows; -1 is missing.
        labels: Value names of those conditions that are classes.
        read: Reads rows as images, uint8 [n, height, width, 3]; raises ValueError if one is broken.
        files: The undecoded images, for `content_sha256`; None if the summary tells their content.
    """

    count: int
    summary: dict[str, Any]
    conditions: dict[str, list[int]]
    labels: dict[str, list[str]]
    read: Callable[[Sequence[int]], np.ndarray]
    files: Dataset | None = None

    @functools.cached_property
    def content_sha256(self) -> str | None:
        """The hash of the bytes of all images, which reads every one; None if the summary tells it."""
        if self.files is None:
            return None
        hashes = map_rows(lambda row: _hash_image(row["image"]), self.files, "hashing", "images", shown=False)
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def spread(self, most: int) -> ReferenceImages:
        """Return at most `most` of the images, evenly spread: a cache may be sorted by class."""
        if self.count <= most:
            return self
        chosen = np.arange(most) * self.count // most
        return dataclasses.replace(
            self,
            count=most,
            summary={**self.summary, "pictures": most, "spread_over": self.count},
            conditions={name: np.array(ids)[chosen].tolist() for name, ids in self.conditions.items()},
            read=lambda rows: self.read(chosen[np.array(rows)].tolist()),
            files=self.files.select(chosen) if self.files is not None else None,
        )

    @functools.cached_property
    def stamps_sha256(self) -> str | None:
        """The hash of size, time of modification and inode of all files; None if one is missing or not a file."""
        digest = hashlib.sha256()
        for row in self.files or ():
            try:
                stamp = image_stamp(row["image"])
            except OSError:
                return None
            if stamp == NO_STAMP:
                return None
            digest.update(repr(stamp).encode())
        return digest.hexdigest() if self.files else None

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
    source: str, geometry: Geometry, options: SourceOptions | None = None, verbose: bool = False
) -> ReferenceImages:
    """Open the images of any source, see [`dit_hf.open_images`], or the decoded latents of a cache.

    Args:
        source: Source of images, or the folder of a latent cache.
        geometry: Crop and resolution; ignored for a cache, which has its own.
        options: How the source is read; of a cache, `split` and `num_images` choose its first so many rows.
        verbose: Whether the plan of what the source holds is printed.

    Raises:
        ValueError: for options that do not fit the source.
        FileNotFoundError: if the source does not exist or holds no images.
    """
    options = options or SourceOptions()
    if (Path(source) / CACHE_INFO).is_file():
        return _open_decoded(source, options.split, options.num_images)
    if geometry.resolution is None:
        raise ValueError("resolution is needed: the images of a reference have one size")
    options = dataclasses.replace(options, avatar_size=max(geometry.resolution))
    opened = open_on_first_rank(lambda: open_faces(open_source(source, options), geometry))
    if verbose:
        print("\n".join(opened.plan.lines()), flush=True)
    rows = opened.rows
    height, width = geometry.resolution
    # Keys and values are part of the statistics' identity: a change would make earlier statistics look different.
    summary = {
        "source": opened.name,
        "pictures": len(rows),
        "sha256_of_rows": opened.sha256,
        "split": options.split,
        "crop": geometry.crop,
        "resolution": f"{height}x{width}",
        "resize": "PIL's antialiased bicubic",
    }
    if source == AVATARS:
        summary["seed"] = options.seed

    def read(numbers: Sequence[int]) -> np.ndarray:
        own = ({**row, "image": with_bytes(row["image"])} for row in (rows[int(number)] for number in numbers))
        return np.stack([np.asarray(decode_image(row, geometry)) for row in own])

    conditions, features = _read_conditions(rows), rows.features
    labels = {name: features[name].names for name in conditions if isinstance(features[name], ClassLabel)}
    # Avatars are rendered from the seed alone.
    files = None if source == AVATARS else rows.select_columns("image")
    return ReferenceImages(len(rows), summary, conditions, labels, read, files)


def open_training_images(model: str, resolution: str, options: SourceOptions, most: int) -> ReferenceImages:
    """Open the images that a run was trained on, from the latent cache that its recipe names.

    Args:
        model: The run's folder, or that of its pipeline or of a checkpoint.
        resolution: `HxW` pixels, of avatars only.
        options: `split` and `num_images` choose the first so many images of a split, by default of the training split.
        most: How many images to take without `num_images`, evenly spread over all.

    Raises:
        ValueError: if there is no such cache.
    """
    run = find_run(model) or Path(model)
    cache = Path(read_run_config(run).data.latents) if RunFolder(run).config.is_file() else None
    if cache is None or not (cache / CACHE_INFO).is_file():
        raise ValueError(f"{model}: its training images are not here; give --reference a source or statistics")
    settings = read_cache_info(cache)["settings"]
    # Avatars can be rendered again; of any other source only the decoded latents are certain to be at hand.
    if settings["source"] == AVATARS:
        count = options.num_images or settings["num_images"]
        avatars = dataclasses.replace(options, num_images=count, seed=settings["seed"])
        images = open_reference_images(AVATARS, Geometry(parse_resolution(resolution)), avatars)
    else:
        images = _open_decoded(str(cache), options.split or "train", options.num_images)
    return images if options.num_images else images.spread(most)


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
    cache, info = open_latents(folder, hashes=True)
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

    conditions = {name: _ids(rows, name) for name in info["conditions"]}
    return ReferenceImages(len(rows), summary, conditions, info["condition_labels"], read)


def _hash_image(stored: dict[str, Any] | None) -> str:
    """Return the hash of an undecoded image's bytes, or a word for one that cannot be read."""
    try:
        return hashlib.sha256(stored_bytes(stored) or b"").hexdigest()
    except OSError:
        return "unreadable"


def _read_conditions(rows: Dataset) -> dict[str, list[int]]:
    """Return the ids of the columns that are conditions: classes, and yes/no attributes as int8."""
    features = rows.features  # copied by each access
    names = [
        name
        for name in condition_names(features)
        if isinstance(features[name], ClassLabel) or features[name].dtype == "int8"
    ]
    return {name: _ids(rows, name) for name in names}


def _ids(rows: Dataset, name: str) -> list[int]:
    """Return a column of condition ids, with -1 for a missing value."""
    return [-1 if value is None else value for value in rows[name][:]]
