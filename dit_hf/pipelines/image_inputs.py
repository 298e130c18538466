"""Read an image of any kind as 8-bit RGB: orientation, transparency, palettes and 16 bits."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Return an image of any mode as 8-bit RGB, turned by its EXIF orientation.

    Args:
        image: Any image of PIL. Of 16 bits per channel the upper 8 are kept.
        background: Color behind transparent pixels.

    Raises:
        ValueError: if its pixels are neither 8 nor 16 bits wide.
    """
    image = ImageOps.exif_transpose(image)
    # PIL opens some images of 16 bits as 32.
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("32-bit pixels")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image.convert("RGB")
