import numpy as np
import pytest
from PIL import Image

from dit_hf import open_images
from dit_hf.data.transforms import parse_resolution


@pytest.fixture
def folder(tmp_path):
    """A black portrait of CelebA's size with a red left half."""
    portrait = np.zeros((218, 178, 3), np.uint8)
    portrait[:, :89, 0] = 255
    Image.fromarray(portrait).save(tmp_path / "portrait.png")
    return tmp_path


def test_resolutions():
    assert parse_resolution(64) == (64, 64)
    assert parse_resolution("64x48") == (64, 48)
    assert parse_resolution((64, 48)) == (64, 48)
    assert parse_resolution(None) is None


@pytest.mark.parametrize(
    ("crop", "size"), [("none", (178, 218)), ("celeba-178", (178, 178)), ("celeba-140", (140, 140))]
)
def test_crops_keep_the_middle(folder, crop, size):
    image = open_images(str(folder), crop=crop)[0]["image"]
    assert image.size == size
    pixels = np.asarray(image)
    assert pixels[:, : size[0] // 2, 0].min() == 255
    assert pixels[:, size[0] // 2 :, 0].max() == 0


def test_center_crop_has_the_resolutions_shape(folder):
    pixels = np.asarray(open_images(str(folder), resolution=(50, 100))[0]["image"])
    assert pixels.shape == (50, 100, 3)
    assert pixels[:, :48, 0].min() == 255
    assert pixels[:, 52:, 0].max() == 0


def test_resize_is_antialiased(tmp_path):
    checkers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checkers).save(tmp_path / "checkers.png")
    pixels = np.asarray(open_images(str(tmp_path), resolution=16)[0]["image"], float)
    assert np.abs(pixels[2:-2, 2:-2] - 127.5).max() < 8


def test_the_error_names_a_broken_image(folder):
    (folder / "e.jpg").write_bytes(b"no jpeg")
    with pytest.raises(ValueError, match=r"e\.jpg"):
        open_images(str(folder), resolution=8)[0]


# Single images of any mode to RGB.


def opened(path):
    """Return the only image of a folder, read as those of a source are."""
    (row,) = open_images(str(path.parent))
    assert row["image"].mode == "RGB"
    return row["image"]


def test_exif_orientation_is_applied(tmp_path):
    turned = Image.new("RGB", (60, 100))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned.save(tmp_path / "a.png", exif=exif)
    assert opened(tmp_path / "a.png").size == (100, 60)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(tmp_path, mode):
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 10, 20))
    image.convert(mode).save(tmp_path / "a.png")
    pixels = np.asarray(opened(tmp_path / "a.png"))
    assert pixels[:, :10].max() == 0
    assert pixels[:, 10:].min() == 255


def test_of_16_bits_the_upper_8_are_kept(tmp_path):
    Image.fromarray(np.array([[0x0000, 0x12FF], [0x8000, 0xFFFF]], np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(opened(tmp_path / "a.png"))[..., 0].tolist() == [[0x00, 0x12], [0x80, 0xFF]]


@pytest.mark.parametrize(("kind", "reason"), [(np.float32, "floating-point pixels"), (np.int32, "32-bit pixels")])
def test_the_error_names_pixels_that_are_not_of_8_or_16_bits(tmp_path, kind, reason):
    Image.fromarray(np.full((20, 20), 70_000, kind)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=rf"a\.tiff: {reason}"):
        opened(tmp_path / "a.tiff")
