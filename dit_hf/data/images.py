"""Images of any source as one `datasets.Dataset`: `id`, `image` and one column a condition."""

from __future__ import annotations

import functools

from datasets import Dataset

from .sources import DEFAULT_AVATAR_SIZE, open_source
from .transforms import Geometry, decode_image, parse_resolution


def open_images(
    source: str,
    resolution: int | str | tuple[int, int] | None = None,
    crop: str = "center",
    num_images: int | None = None,
    split: str | None = None,
    seed: int = 0,
    dataset_config_name: str | None = None,
) -> Dataset:
    """Open the images of any source as a data set with `id`, `image` and one column a condition.

    Args:
        source: `"avatars"`, the embedded data set; a folder of images (CelebA with its lists, CelebA-HQ, subfolders
            that are classes or splits, `metadata.csv` or `metadata.jsonl`, or just images); a parquet or webdataset
            file or a folder of them, or one of `save_to_disk`; or the id of a data set on the Hub.
        resolution: `N`, `"HxW"` or `(H, W)` in pixels; None keeps each picture's own size (avatars: 64).
        crop: `"celeba-178"`, `"celeba-140"`, `"center"` or `"none"`, see [`Geometry`].
        num_images: how many images; None is all (avatars: 8,000).
        split: `"train"`, `"validation"` or `"test"`, for sources that come divided.
        seed: which avatars; other images are always in the order of their names, or of their rows.
        dataset_config_name: which configuration of a data set on the Hub.

    Returns:
        A data set whose `image` is decoded, cropped and resized to an RGB `PIL.Image` when a row is read, with `id`,
        `split` where the source comes divided, and one column a condition: attributes as int8 (1 is yes), classes as
        `ClassLabel`.

    Raises:
        FileNotFoundError: if the source does not exist or holds no image.
        ValueError: for an unknown crop, size or split, or (on reading a row) an image that cannot be decoded.
    """
    geometry = Geometry(parse_resolution(resolution), crop)
    avatar_size = max(geometry.resolution or (DEFAULT_AVATAR_SIZE,))
    rows = open_source(source, dataset_config_name, split, num_images, seed, avatar_size).rows
    return rows.with_transform(functools.partial(_decode_batch, geometry=geometry))


def _decode_batch(batch: dict[str, list], geometry: Geometry) -> dict[str, list]:
    if "image" not in batch:
        return batch
    names = batch.get("id", batch["image"])
    images = [
        decode_image({"id": name, "image": stored}, geometry)
        for name, stored in zip(names, batch["image"], strict=True)
    ]
    return {**batch, "image": images}
