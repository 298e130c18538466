"""Open the images of any source as one `datasets.Dataset` with `id`, `image` and one column per condition."""

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
    """Open the images of any source as a dataset with `id`, `image` and one column per condition.

    Args:
        source: `"avatars"`, the embedded dataset; a folder of images (CelebA with its lists, CelebA-HQ, subfolders
            that are classes or splits, `metadata.csv` or `metadata.jsonl`, or only images); a parquet or webdataset
            file or a folder of them, or a folder of `save_to_disk`; or the id of a dataset on the Hub.
        resolution: `N`, `"HxW"` or `(H, W)` in pixels; None keeps the size of each image (avatars: 64).
        crop: `"celeba-178"`, `"celeba-140"`, `"center"` or `"none"`, see [`Geometry`].
        num_images: open only the first `num_images` images; None is all (avatars: 8,000).
        split: `"train"`, `"validation"` or `"test"`, for sources that have splits.
        seed: seed of the avatars; other images are always in the order of their names or rows.
        dataset_config_name: the configuration of a dataset on the Hub.

    Returns:
        A dataset whose `image` is decoded, cropped and resized to an RGB `PIL.Image` when a row is read, with `id`,
        `split` if the source has splits, and one column per condition: attributes as int8 (1 is yes), classes as
        `ClassLabel`.

    Raises:
        FileNotFoundError: if the source does not exist or holds no image.
        ValueError: for an unknown crop, size or split, or (when a row is read) an image that cannot be decoded.
    """
    geometry = Geometry(parse_resolution(resolution), crop)
    # Avatars are rendered as squares, large enough for both sides.
    avatar_size = max(geometry.resolution or (DEFAULT_AVATAR_SIZE,))
    rows = open_source(source, dataset_config_name, split, num_images, seed, avatar_size).rows
    return rows.with_transform(functools.partial(_decode_batch, geometry=geometry))


def _decode_batch(batch: dict[str, list], geometry: Geometry) -> dict[str, list]:
    """Decode the images of a batch of rows, of which any subset of the columns may have been selected."""
    if "image" not in batch:
        return batch
    ids = batch.get("id", batch["image"])  # used in error messages alone
    images = [
        decode_image({"id": image_id, "image": stored}, geometry)
        for image_id, stored in zip(ids, batch["image"], strict=True)
    ]
    return {**batch, "image": images}
