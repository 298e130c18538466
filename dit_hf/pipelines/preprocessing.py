"""Images and masks of a call, in whatever form they are passed, as tensors at the model's size."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .image_inputs import center_box, open_image, to_rgb, upright

logger = logging.getLogger(__name__)

# Anything that `read_images` takes: a PIL image, an array, a tensor, a path, or a list of these.
ImageInput = Any
InputRange = tuple[float, float]

ROUNDING = 1 / 255  # how far floats may leave their range; resizing overshoots by less than that
# Below this value, of 1, a mask counts as black. So does a map of a few labels that is not a mask.
NEARLY_BLACK = 1 / 16
# How far the channels of a gray pixel may differ, of 255: JPEG does not keep them equal.
GRAY_TOLERANCE = 32


def read_images(
    image: ImageInput, height: int, width: int, input_range: InputRange | None = None
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Read images of any form and size, cropped at the center to the aspect ratio and resized with antialiasing.

    Args:
        image: One or a list (or batch) of: a PIL image of any mode, a path, an array or a tensor, [height, width] or
            with channels (gray, RGB, RGBA) in the first or last place. An EXIF orientation is applied, transparency is
            shown on white, of 16 bits the upper 8 are kept. Arrays are read by their dtype: uint8 is 0 to 255, floats
            are 0 to 1.
        height: Of the result.
        width: Of the result.
        input_range: The values of black and white in arrays and tensors, where they are others, e.g. `(-1, 1)`.

    Returns:
        float32 [images, 3, height, width] between -1 and 1, and the width and height of each image before.

    Raises:
        ValueError: for values outside of the range, shapes that can be read in two ways, and what is not an image.
        OSError: for a file that cannot be read.
    """
    images = [_rgb(item, name, input_range) for item, name in _items(image, "image")]
    pixels = torch.stack([_fit(each, height, width, Image.Resampling.BICUBIC) for each in images])
    return 2.0 * pixels - 1.0, [_size(each) for each in images]


def read_masks(
    mask_image: ImageInput, height: int, width: int, image_sizes: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """Read masks of any form and size, cropped and resized like the images that they belong to.

    Args:
        mask_image: One mask for all images, or one for each, in the forms of `read_images`; batches may also be
            [masks, height, width]. Transparency is black. Integers up to 1 are 0 and 1; so are the pixels of an image
            that has no others.
        height: Of the result.
        width: Of the result.
        image_sizes: Width and height of each image.

    Returns:
        float32 [1 or images, 1, height, width] between 0 and 1; a mask that is black is reported.

    Raises:
        ValueError: for another number of masks than of images, another aspect ratio, colors, and as `read_images`.
        OSError: for a file that cannot be read.
    """
    masks = [_gray(item, name) for item, name in _items(mask_image, "mask_image", is_mask=True)]
    if len(masks) not in (1, len(image_sizes)):
        raise ValueError(f"{len(masks)} masks for {len(image_sizes)} images")
    for i, image_size in enumerate(image_sizes):
        _check_aspect(_size(masks[i % len(masks)]), image_size)
    pixels = torch.stack([_fit(mask, height, width, Image.Resampling.BILINEAR) for mask in masks])
    black = [i for i, mask in enumerate(pixels) if mask.max() < NEARLY_BLACK]
    if black:
        which = "mask_image" if len(masks) == 1 else f"mask_image[{black[0]}]"
        highest = pixels[black[0]].max().item()
        logger.warning(f"{which} is black (its highest value is {highest:.3g} of 1): nothing is inpainted")
    return pixels


def _items(given: Any, name: str, is_mask: bool = False) -> Iterator[tuple[Any, str]]:
    """Yield each image of a list, array or batch with its name: a PIL image, or an array [height, width, channels]."""
    if isinstance(given, list | tuple):
        if not given:
            raise ValueError(f"{name} is an empty list")
        for i, item in enumerate(given):
            yield from _items(item, f"{name}[{i}]", is_mask)
    elif isinstance(given, str | os.PathLike):
        yield _open(given, name), f"{name} {os.fspath(given)}"
    elif isinstance(given, Image.Image):
        yield given, name
    elif isinstance(given, torch.Tensor) or hasattr(given, "__array__"):
        for array in _split_batch(_array(given), name, is_mask):
            yield array, name
    else:
        kinds = "a PIL image, an array, a tensor, a path or a list of these"
        raise ValueError(f"{name}: expected {kinds}, got {type(given).__name__}")


def _open(given: str | os.PathLike, name: str) -> Image.Image:
    path = Path(given)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: {given} is not a file")
    try:
        return open_image(path.read_bytes(), path.name)
    except Exception as error:  # broken bytes make decoders raise anything
        reason = f" ({error})" if type(error) is ValueError else ""
        raise ValueError(f"{name}: {given} is not an image that can be read{reason}") from error


def _array(given: Any) -> np.ndarray:
    """Return an array or tensor as an array, half precision as float32."""
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        return (given.float() if given.is_floating_point() else given).numpy()
    return np.asarray(given)


def _split_batch(array: np.ndarray, name: str, is_mask: bool) -> list[np.ndarray]:
    """Return the images of an array, each [height, width, channels]."""
    expected = f"{name}: expected [height, width], with channels first or last, or a batch of these"
    if array.size == 0 or not 2 <= array.ndim <= 4:
        raise ValueError(f"{expected}; got the shape {list(array.shape)}")
    if array.ndim == 2:
        return [array[..., None]]
    if array.ndim == 4:
        return [image for each in array for image in _split_batch(each, name, is_mask)]

    # Three dimensions: channels are where there are as few as that.
    first, last = array.shape[0] in (1, 3, 4), array.shape[2] in (1, 2, 3, 4)
    if first and last:
        raise ValueError(
            f"{name}: the shape {list(array.shape)} can be read with channels first or last; use [H, W, C]"
        )
    if last:
        return [array]
    # Masks have no colors: different planes are different masks, equal ones are a gray image.
    if is_mask and not (first and (array == array[:1]).all()):
        return [plane[..., None] for plane in array]
    if not first:
        raise ValueError(f"{expected}; got the shape {list(array.shape)}")
    return [np.moveaxis(array, 0, 2)]


def _rgb(item: Any, name: str, input_range: InputRange | None) -> Image.Image | torch.Tensor:
    """Return an image as RGB: 8 bits as a PIL image, floats as a tensor [3, height, width] between 0 and 1."""
    if isinstance(item, Image.Image) and item.mode != "F":
        if input_range is not None:
            raise ValueError(f"{name}: input_range is for arrays and tensors; a PIL image needs none")
        return _converted(item, name, "white")
    array = np.asarray(item)[..., None] if isinstance(item, Image.Image) else item
    values = _declared(array, name, input_range) if input_range is not None else _by_dtype(array, name)
    if values.dtype == np.uint8:
        return _converted(_pil_image(values), name, "white")
    pixels = _channels_first(values)
    if len(pixels) in (2, 4):
        alpha = pixels[-1:]
        pixels = pixels[:-1] * alpha + 1 - alpha
    return pixels.expand(3, -1, -1)


def _gray(item: Any, name: str) -> Image.Image | torch.Tensor:
    """Return a mask: 8 bits as a PIL image of mode L, floats as a tensor [1, height, width] between 0 and 1."""
    if isinstance(item, Image.Image) and item.mode != "F":
        return _gray_image(item, name)
    array = np.asarray(item)[..., None] if isinstance(item, Image.Image) else item
    values = _by_dtype(array, name, is_mask=True)
    if values.dtype == np.uint8:
        return _gray_image(_pil_image(values), name)
    pixels = _channels_first(values)
    color, alpha = (pixels[:-1], pixels[-1:]) if len(pixels) in (2, 4) else (pixels, 1)
    if (color.amax(dim=0) - color.amin(dim=0)).max() * 255 > GRAY_TOLERANCE:
        raise ValueError(_colored(name))
    return color.mean(dim=0, keepdim=True) * alpha


def _gray_image(image: Image.Image, name: str) -> Image.Image:
    """Return a mask of 8 bits; one of 0 and 1 alone, as a map of labels has, becomes one of 0 and 255."""
    if image.mode.startswith("I"):
        # Before the conversion, which keeps only the upper 8 of 16 bits.
        values = np.asarray(image)
        if values.min() >= 0 and values.max() == 1:
            return Image.fromarray(np.asarray(upright(image)).astype(np.uint8) * 255)
    rgb = np.asarray(_converted(image, name, "black"))
    if (rgb.max(axis=2).astype(int) - rgb.min(axis=2)).max() > GRAY_TOLERANCE:
        raise ValueError(_colored(name))
    gray = Image.fromarray(rgb).convert("L")
    highest: Any = gray.getextrema()[1]
    return gray.point(lambda value: 255 * value) if highest == 1 else gray


def _colored(name: str) -> str:
    return f"{name} has colors; expected white where to inpaint, black where to keep, and gray to blend"


def _converted(image: Image.Image, name: str, background: str) -> Image.Image:
    try:
        return to_rgb(image, background)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; convert it to 8 bits") from error
    except OSError as error:  # truncated: the pixels are decoded only now
        raise OSError(f"{name}: {error}") from error


def _by_dtype(array: np.ndarray, name: str, is_mask: bool = False) -> np.ndarray:
    """Return an array as uint8 between 0 and 255, or as float32 between 0 and 1.

    Raises:
        ValueError: naming the ways out, for values that do not fit the dtype, or that can be read in two ways.
    """
    advice = "pass uint8 (0 to 255) or floats (0 to 1)"
    advice += "" if is_mask else ", or declare the values of black and white, e.g. input_range=(-1, 1) or (0, 255)"
    if array.dtype.kind == "f":
        return _clipped(array.astype(np.float32), f"{name}: floats are 0 to 1", advice)
    if array.dtype.kind not in "biu":
        raise ValueError(f"{name}: expected numbers, got the dtype {array.dtype}")
    lowest, highest = int(array.min()), int(array.max())
    problem = f"{name}: {array.dtype} with values from {lowest} to {highest}"
    if array.dtype == bool or (is_mask and lowest >= 0 and highest == 1):
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint8 or lowest == highest == 0:
        return array.astype(np.uint8)
    if array.dtype == np.uint16 and highest > 255:
        return (array >> 8).astype(np.uint8)
    if array.dtype == np.uint16 or highest == 1:
        raise ValueError(f"{problem} can be read in two ways; {advice}")
    if lowest < 0 or highest > 255:
        raise ValueError(f"{problem}; {advice}")
    return array.astype(np.uint8)


def _declared(array: np.ndarray, name: str, input_range: InputRange) -> np.ndarray:
    """Return an array whose black and white are `input_range` as float32 between 0 and 1, or bytes as they are."""
    low, high = input_range
    if not low < high:
        raise ValueError(f"input_range={input_range} must be the values of black and white, e.g. (-1, 1)")
    if array.dtype == np.uint8 and (low, high) == (0, 255):
        return array
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: expected numbers, got the dtype {array.dtype}")
    values = (array.astype(np.float32) - low) / (high - low)
    return _clipped(values, f"{name}: input_range={input_range} is declared", "declare the range that it has")


def _clipped(values: np.ndarray, expected: str, advice: str) -> np.ndarray:
    """Return floats clipped to 0 to 1.

    Raises:
        ValueError: if one is further outside than by rounding, or not a number.
    """
    lowest, highest = values.min(), values.max()
    if not (lowest >= -ROUNDING and highest <= 1 + ROUNDING):  # NaN compares as False
        finite = np.isfinite([lowest, highest]).all()
        found = f"values are {lowest:.4g} to {highest:.4g}" if finite else "some values are not finite"
        raise ValueError(f"{expected}, but {found}; {advice}")
    return values.clip(0, 1)


def _pil_image(values: np.ndarray) -> Image.Image:
    """Return uint8 [height, width, channels] as a PIL image: L, LA, RGB or RGBA."""
    return Image.fromarray(np.ascontiguousarray(values[..., 0] if values.shape[2] == 1 else values))


def _channels_first(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, 2, 0)))


def _size(image: Image.Image | torch.Tensor) -> tuple[int, int]:
    """Return width and height."""
    return image.size if isinstance(image, Image.Image) else (image.shape[2], image.shape[1])


def _check_aspect(mask: tuple[int, int], image: tuple[int, int]) -> None:
    """Raise a ValueError unless a mask covers the same area as its image, up to a rounded side of the smaller one."""
    if abs(mask[0] * image[1] - image[0] * mask[1]) > max(*mask, *image):
        raise ValueError(
            f"the mask of {mask[0]}x{mask[1]} px has another aspect ratio than its image of {image[0]}x{image[1]} px"
        )


def _fit(image: Image.Image | torch.Tensor, height: int, width: int, resample: Image.Resampling) -> torch.Tensor:
    """Crop an image at the center and resize it; float32 [channels, height, width] between 0 and 1."""
    box = center_box(*_size(image), height, width)
    unchanged = box == (0, 0, width, height)  # already of this size: a filter must not touch the pixels
    if isinstance(image, Image.Image):
        image = image.crop(box) if unchanged else image.resize((width, height), resample, box=box)
        values = np.asarray(image, dtype=np.float32)
        return _channels_first(values[..., None] if values.ndim == 2 else values) / 255.0
    left, top, right, bottom = box
    image = image[:, top:bottom, left:right]
    if not unchanged:
        mode = "bicubic" if resample == Image.Resampling.BICUBIC else "bilinear"
        image = torch.nn.functional.interpolate(image[None], (height, width), mode=mode, antialias=True)[0]
    return image.clamp(0, 1)
