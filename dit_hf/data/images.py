"""Pictures of any source as one `datasets.Dataset`: `id`, `image` and one column a condition."""

from __future__ import annotations

import functools
import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageOps

from .avatars import open_avatars

AVATARS = "avatars"
CROPS = ("celeba-178", "celeba-140", "center", "none")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
DEFAULT_NUM_AVATARS = 8000


@dataclass(frozen=True)
class Geometry:
    """How a picture becomes `resolution` (height, width) pixels: crop by name, then an antialiased resize.

    `celeba-178` and `celeba-140` are the centred 178 and 140 px squares of CelebA's aligned 178 x 218 pictures,
    `center` is the largest centred box of the resolution's shape, `none` stretches the whole picture.
    """

    resolution: tuple[int, int] | None
    crop: str = "center"

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f"crop={self.crop!r} is unknown; known are {', '.join(CROPS)}")

    def fit(self, image: PILImage.Image) -> PILImage.Image:
        """Bring `image` into shape: EXIF orientation, RGB, crop, resize."""
        image = ImageOps.exif_transpose(image).convert("RGB")
        box = self._box(image.width, image.height)
        if self.resolution is None:
            return image.crop(box)
        height, width = self.resolution
        if box == (0, 0, width, height):
            return image.crop(box)
        return image.resize((width, height), PILImage.Resampling.BICUBIC, box=box)

    def _box(self, width: int, height: int) -> tuple[float, float, float, float]:
        if self.crop.startswith("celeba-"):
            side = int(self.crop.removeprefix("celeba-"))
            if width < side or height < side:
                raise ValueError(f"{width}x{height} px is smaller than the crop {self.crop}")
            box_width = box_height = side
        elif self.crop == "center" and self.resolution is not None:
            scale = min(width / self.resolution[1], height / self.resolution[0])
            box_width, box_height = round(self.resolution[1] * scale), round(self.resolution[0] * scale)
        else:
            return 0, 0, width, height
        left, top = (width - box_width) // 2, (height - box_height) // 2
        return left, top, left + box_width, top + box_height


def parse_resolution(resolution: int | str | tuple[int, int] | None) -> tuple[int, int] | None:
    """(height, width) of `64`, `"64"`, `"64x48"` or `(64, 48)`; None stays None.

    Raises:
        ValueError: if it is none of these.
    """
    if resolution is None:
        return None
    parts = str(resolution).lower().split("x") if isinstance(resolution, int | str) else list(resolution)
    try:
        sizes = [int(part) for part in parts]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise ValueError(f"resolution={resolution!r} is not a size; write 256 or 256x192 (height x width)")
    return sizes[0], sizes[-1]


def open_images(
    source: str,
    resolution: int | str | tuple[int, int] | None = None,
    crop: str = "center",
    num_images: int | None = None,
    split: str | None = None,
    seed: int = 0,
) -> Dataset:
    """Open the pictures of any source as a data set with `id`, `image` and one column a condition.

    Args:
        source: a folder of pictures (with its subfolders), or `"avatars"`, the embedded data set.
        resolution: `N`, `"HxW"` or `(H, W)` in pixels; None keeps each picture's own size (avatars: 64).
        crop: `"celeba-178"`, `"celeba-140"`, `"center"` or `"none"`, see [`Geometry`].
        num_images: how many pictures; None is all (avatars: 8,000).
        split: `"train"`, `"validation"` or `"test"`, for sources that come divided.
        seed: which avatars; pictures of a folder are always in the order of their names.

    Returns:
        A data set whose `image` is decoded, cropped and resized to an RGB `PIL.Image` when a row is read.

    Raises:
        FileNotFoundError: if the source does not exist or holds no picture.
        ValueError: for an unknown crop, size or split, or (on reading a row) a picture that cannot be decoded.
    """
    rows, geometry = open_rows(source, resolution, crop, num_images, split, seed)
    return rows.with_transform(functools.partial(_decode_batch, geometry=geometry))


def open_rows(
    source: str,
    resolution: int | str | tuple[int, int] | None,
    crop: str,
    num_images: int | None,
    split: str | None,
    seed: int,
) -> tuple[Dataset, Geometry]:
    """What [`open_images`] stands on: the rows with undecoded pictures, and the geometry to decode them into."""
    geometry = Geometry(parse_resolution(resolution), crop)
    if num_images is not None and num_images < 1:
        raise ValueError(f"num_images={num_images} must be at least 1")
    if split is not None:
        raise ValueError(f"split={split!r}: {source} does not come divided into splits")
    if source == AVATARS:
        size = max(geometry.resolution) if geometry.resolution else 64
        processes = min(available_cpus(), 1 + (num_images or DEFAULT_NUM_AVATARS) // 200)
        rows = open_avatars(num_images or DEFAULT_NUM_AVATARS, size, seed, num_proc=processes)
        return rows.cast_column("image", Image(decode=False)), geometry
    return _open_folder(Path(source), num_images), geometry


def decode_image(row: dict[str, Any], geometry: Geometry) -> PILImage.Image:
    """Decode the picture of one undecoded row.

    Raises:
        ValueError: if the picture is broken or too small for the crop, with its name and the reason.
    """
    stored = row["image"]
    try:
        with PILImage.open(io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"]) as image:
            return geometry.fit(image)
    except Exception as error:  # broken bytes make decoders raise anything, from OSError to struct.error
        raise ValueError(f"{row['id']}: {error}") from error


def _decode_batch(batch: dict[str, list], geometry: Geometry) -> dict[str, list]:
    if "image" not in batch:
        return batch
    names = batch.get("id", batch["image"])
    images = [
        decode_image({"id": name, "image": stored}, geometry)
        for name, stored in zip(names, batch["image"], strict=True)
    ]
    return {**batch, "image": images}


def _open_folder(folder: Path, num_images: int | None) -> Dataset:
    if not folder.is_dir():
        raise FileNotFoundError(f"source {folder}: no such folder (and not {AVATARS!r}, the embedded data set)")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    if not paths:
        raise FileNotFoundError(f"source {folder}: no pictures in it ({', '.join(EXTENSIONS)})")
    paths = paths[:num_images]
    return Dataset.from_dict(
        {
            "id": [path.relative_to(folder).as_posix() for path in paths],
            "image": [{"bytes": None, "path": str(path.resolve())} for path in paths],
        },
        features=Features({"id": Value("string"), "image": Image(decode=False)}),
    )


def available_cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_held_out(image_id: str, share: float = 0.02) -> bool:
    """Whether a picture is held out for validation: decided by the hash of its id alone, so by nothing else."""
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8]) < share * 2**64
