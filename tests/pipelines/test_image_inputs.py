"""Images of any mode as 8-bit RGB, composited by the formula."""

import numpy as np
import pytest
from PIL import Image

from dit_hf.pipelines.image_inputs import to_rgb


@pytest.mark.parametrize(("background", "level"), [("white", 255), ("black", 0)])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_on_the_background(mode, background, level):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 7, len(mode)), np.uint8)
    color, alpha = pixels[..., :-1].astype(float), pixels[..., -1:] / 255
    expected = np.broadcast_to(color * alpha + level * (1 - alpha), (5, 7, 3))
    np.testing.assert_allclose(np.asarray(to_rgb(Image.fromarray(pixels), background)), expected, atol=1)


def test_a_palette_with_a_transparent_color_is_on_the_background():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 1
    assert np.asarray(to_rgb(image)).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_of_16_bits_the_upper_8_are_kept_and_other_depths_are_refused():
    levels = np.array([[0, 255, 256, 0x1234, 0xFFFF]])
    assert np.asarray(to_rgb(Image.fromarray(levels.astype(np.uint16))))[0, :, 0].tolist() == [0, 0, 1, 0x12, 0xFF]
    for kind, message in ((np.int32, "32-bit"), (np.float32, "floating-point")):
        with pytest.raises(ValueError, match=message):
            to_rgb(Image.fromarray((levels * 2).astype(kind)))
