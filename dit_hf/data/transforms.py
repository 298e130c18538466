"""Turn a stored image into pixels: decoding, orientation, RGB, crop and resize."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from ..pipelines.image_inputs import center_box, open_image, to_rgb
from ..storage import first_line

# Part of what identifies a cache, raised whenever the same file becomes other pixels. Version 1, of dit_hf 0.1.0,
# ignored color profiles and read 32-bit integers as 16-bit ones.
DECODING_VERSION = 2
_MAX_SIDE = 32_768
CROPS = ("celeba-178", "celeba-140", "center", "none")


@dataclass(frozen=True)
class Geometry:
    """Crop by name, then antialiased bicubic resize.

    Attributes:
        resolution: (height, width) in pixels; None does not resize.
        crop: `celeba-178` and `celeba-140` are the centered 178 and 140 px squares of CelebA's aligned 178 x 218
            images, `center` is the largest centered box of the resolution's aspect ratio, `none` stretches the whole
            image.
        background: Color behind transparent pixels.

    Raises:
        ValueError: for an unknown crop.
    """

    resolution: tuple[int, int] | None
    crop: str = "center"
    background: str = "white"

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f"crop={self.crop!r} is unknown; valid names are {', '.join(CROPS)}")

    def fit(self, image: PILImage.Image) -> PILImage.Image:
        """Return `image` turned by its EXIF orientation, as RGB in sRGB, cropped and resized.

        Raises:
            ValueError: if the image is smaller than the crop, or its pixels cannot be read as 8 bits, see `to_rgb`.
        """
        image = to_rgb(image, self.background)
        box = self._box(image.width, image.height)
        if self.resolution is None:
            return image.crop(box)
        height, width = self.resolution
        if box == (0, 0, width, height):  # already of this size: a bicubic filter must not touch the pixels
            return image.crop(box)
        return image.resize((width, height), PILImage.Resampling.BICUBIC, box=box)

    def _box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return (left, top, right, bottom) of the crop of an image of this size."""
        if self.crop.startswith("celeba-"):
            side = int(self.crop.removeprefix("celeba-"))
            if width < side or height < side:
                raise ValueError(f"{width}x{height} px is smaller than the crop {self.crop}")
            box_width = box_height = side
        elif self.crop == "center" and self.resolution is not None:
            return center_box(width, height, *self.resolution)
        else:
            return 0, 0, width, height
        left, top = (width - box_width) // 2, (height - box_height) // 2
        return left, top, left + box_width, top + box_height


def parse_resolution(resolution: int | str | tuple[int, int] | None) -> tuple[int, int] | None:
    """Return `64`, `"64"`, `"64x48"` or `(64, 48)` as (height, width) in pixels, and None as None.

    Raises:
        ValueError: for anything else.
    """
    if resolution is None:
        return None
    parts = str(resolution).lower().split("x") if isinstance(resolution, int | str) else list(resolution)
    try:
        sizes = [int(part) for part in parts]
    except ValueError:
        sizes = []
    if len(sizes) in (1, 2) and max(sizes) > _MAX_SIDE:
        raise ValueError(f"resolution={resolution!r}: expected sides of at most {_MAX_SIDE:,} pixels")
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise ValueError(f"resolution={resolution!r} is not a size; write 256 or 256x192 (height x width)")
    return sizes[0], sizes[-1]


def decode_image(row: dict[str, Any], geometry: Geometry) -> PILImage.Image:
    """Decode the image of a row.

    Args:
        row: A row with `id`, and the undecoded `image`: a dict of `bytes` and `path`, as `datasets` stores it.
        geometry: Crop and resolution.

    Raises:
        ValueError: naming id and reason, if the image is broken or too small for the crop.
    """
    stored = row["image"] or {}
    try:
        data = stored.get("bytes")
        if data is None and stored.get("path"):
            data = Path(stored["path"]).read_bytes()
        if not data:
            raise ValueError("no image" if data is None else "an empty file")
        with open_image(data, stored.get("path") or str(row["id"])) as image:
            return geometry.fit(image)
    except Exception as error:  # broken bytes make decoders raise anything, from OSError to struct.error
        raise ValueError(f"{row['id']}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return why an image could not be decoded, without its path, which differs from machine to machine."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
