"""Turn a stored image into pixels: decoding, orientation, RGB, crop and resize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from ..pipelines.image_inputs import center_box, open_image, to_rgb
from ..storage import first_line
from .faces import NO_FACE, Face, align, find_faces, smallest_side
from .stored_images import parse_address, stored_bytes

# Part of what identifies a cache, raised whenever the same file becomes other pixels. Version 1, of dit_hf 0.1.0,
# ignored color profiles and read 32-bit integers as 16-bit ones.
DECODING_VERSION = 2
_MAX_SIDE = 32_768
Decoded = TypeVar("Decoded")
CROPS = ("face", "celeba-178", "celeba-140", "center", "none")
Faces = Literal["all", "largest"]


@dataclass(frozen=True)
class Geometry:
    """Crop by name, then antialiased bicubic resize.

    Attributes:
        resolution: (height, width) in pixels; None does not resize.
        crop: `celeba-178` and `celeba-140` are the centered 178 and 140 px squares of CelebA's aligned 178 x 218
            images, `center` is the largest centered box of the resolution's aspect ratio, `none` stretches the whole
            image. `face` finds the faces of a photograph, and aligns each by eyes, nose and mouth.
        background: Color behind transparent pixels.
        faces: Which faces of a photograph are taken.
        min_face_size: Smallest side of a face's crop in pixels of the photograph; None is half the resolution.

    Raises:
        ValueError: for an unknown crop, options of faces with another crop, or faces that are not square.
    """

    resolution: tuple[int, int] | None
    crop: str = "center"
    background: str = "white"
    faces: Faces = "all"
    min_face_size: int | None = None

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f"crop={self.crop!r} is unknown; valid names are {', '.join(CROPS)}")
        if self.crop != "face" and (self.faces, self.min_face_size) != ("all", None):
            raise ValueError(f"faces and min_face_size belong to crop=face, not to crop={self.crop}")
        if self.faces not in ("all", "largest"):
            raise ValueError(f"faces={self.faces!r} is unknown; valid names are all, largest")
        if self.min_face_size is not None and self.min_face_size < 1:
            raise ValueError(f"min_face_size={self.min_face_size}: expected at least 1 pixel")
        if self.crop == "face" and self.resolution and self.resolution[0] != self.resolution[1]:
            raise ValueError(f"resolution={'x'.join(map(str, self.resolution))}: crop=face makes squares, such as 256")

    @property
    def smallest_face(self) -> float:
        """The smallest side of a face's crop in pixels of the photograph."""
        return smallest_side(self.min_face_size, self.resolution and self.resolution[0])

    def faces_of(self, image: PILImage.Image) -> tuple[list[Face], int]:
        """Find the requested faces of an RGB photograph.

        Returns:
            The faces that are large enough, the largest first, and the number of those that are too small.
        """
        found = find_faces(image)[: 1 if self.faces == "largest" else None]
        large = [face for face in found if face.side >= self.smallest_face]
        return large, len(found) - len(large)

    def fit_face(self, image: PILImage.Image, landmarks: np.ndarray) -> PILImage.Image:
        """Return the aligned face with these landmarks, [5, 2] in pixels, of an RGB photograph."""
        return align(image, landmarks, self.resolution and self.resolution[0])

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


@dataclass
class Crop:
    """An image that a stored one becomes: itself, or one of its faces.

    Attributes:
        id: Id of the row, and of a face `ID#0`, `ID#1`, the largest first.
        pixels: uint8 [height, width, 3].
        face: The face, with crop `face`.
    """

    id: str
    pixels: np.ndarray
    face: Face | None = None


@dataclass
class Crops:
    """All images that a stored one becomes; with a crop other than `face` exactly one.

    Attributes:
        crops: The images.
        too_small: Ids of the faces that are left out because they are too small.
    """

    crops: list[Crop]
    too_small: list[str]


def decode_image(row: dict[str, Any], geometry: Geometry) -> PILImage.Image:
    """Decode the image of a row.

    Args:
        row: A row with `id`, and the undecoded `image`: a dict of `bytes` and `path`, as `datasets` stores it. With
            crop `face` it has `landmarks` too, see [`dit_hf.data.photographs.open_faces`].
        geometry: Crop and resolution.

    Raises:
        ValueError: naming id and reason, if the image is broken or too small for the crop.
    """

    def fit(image: PILImage.Image) -> PILImage.Image:
        if geometry.crop != "face":
            return geometry.fit(image)
        return geometry.fit_face(to_rgb(image, geometry.background), np.reshape(row["image"]["landmarks"], (5, 2)))

    return _decode(row, fit)


def decode_crops(row: dict[str, Any], geometry: Geometry) -> Crops:
    """Decode all images that the image of a row becomes.

    Args:
        row: A row with `id` and the undecoded `image`.
        geometry: Crop and resolution.

    Raises:
        ValueError: naming id and reason, if the image is broken, too small for the crop, or has no face.
    """
    image_id = str(row["id"])
    if geometry.crop != "face":
        return Crops([Crop(image_id, np.asarray(decode_image(row, geometry)))], [])

    def fit(image: PILImage.Image) -> Crops:
        photo = to_rgb(image, geometry.background)
        faces, too_small = geometry.faces_of(photo)
        if not faces and not too_small:
            raise ValueError(NO_FACE)
        images = [np.asarray(geometry.fit_face(photo, face.landmarks)) for face in faces]
        crops = [Crop(f"{image_id}#{i}", *pair) for i, pair in enumerate(zip(images, faces, strict=True))]
        return Crops(crops, [f"{image_id}#{len(faces) + i}" for i in range(too_small)])

    return _decode(row, fit)


def find_in(row: dict[str, Any], geometry: Geometry) -> tuple[list[Face], int]:
    """Find the faces of the photograph of a row, see [`Geometry.faces_of`].

    Raises:
        ValueError: naming id and reason, if it is broken.
    """
    return _decode(row, lambda image: geometry.faces_of(to_rgb(image, geometry.background)))


def photo_of(image_id: str, crop: str) -> str:
    """Return the id of the row that an image is from, see [`Crop`]."""
    return image_id.rpartition("#")[0] if crop == "face" else image_id


def _decode(row: dict[str, Any], fit: Callable[[PILImage.Image], Decoded]) -> Decoded:
    """Open the image of a row and return what `fit` makes of it.

    Raises:
        ValueError: naming id and reason, if any of it fails.
    """
    stored = row["image"] or {}
    try:
        data = stored_bytes(stored)
        if not data:
            raise ValueError("no image" if data is None else "an empty file")
        address = parse_address(stored.get("path"))
        name = str(row["id"]) + address.suffix if address else stored.get("path") or str(row["id"])
        with open_image(data, name) as image:
            return fit(image)
    except Exception as error:  # broken bytes make decoders raise anything, from OSError to struct.error
        raise ValueError(f"{row['id']}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return why an image could not be decoded, without its path, which differs from machine to machine."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
