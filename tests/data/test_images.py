import hashlib

import numpy as np
import pytest
from PIL import Image

from dit_hf import open_images
from dit_hf.data.splits import is_held_out
from dit_hf.data.transforms import parse_resolution


@pytest.fixture
def folder(tmp_path):
    """A portrait with a red left half, a grey image, one with a palette, one turned by EXIF, and a text file."""
    portrait = np.zeros((218, 178, 3), np.uint8)
    portrait[:, :89, 0] = 255
    (tmp_path / "people").mkdir()
    Image.fromarray(portrait).save(tmp_path / "people" / "b.png")
    Image.new("L", (40, 60), 128).save(tmp_path / "a.png")
    Image.new("P", (30, 30)).save(tmp_path / "c.png")
    turned = Image.fromarray(portrait[:100, :60])
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned.save(tmp_path / "d.png", exif=exif)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_is_rgb_of_one_size_in_the_order_of_names(folder):
    images = open_images(str(folder), resolution="32x24")
    assert images["id"] == ["a.png", "c.png", "d.png", "people/b.png"]
    assert all(row["image"].size == (24, 32) and row["image"].mode == "RGB" for row in images)
    assert len(open_images(str(folder), num_images=2)) == 2


@pytest.mark.parametrize(
    ("crop", "size"), [("none", (178, 218)), ("celeba-178", (178, 178)), ("celeba-140", (140, 140))]
)
def test_crops_keep_the_middle(folder, crop, size):
    image = open_images(str(folder / "people"), crop=crop)[0]["image"]
    assert image.size == size
    pixels = np.asarray(image)
    assert pixels[:, : size[0] // 2, 0].min() == 255
    assert pixels[:, size[0] // 2 :, 0].max() == 0


def test_center_crop_has_the_resolutions_shape(folder):
    pixels = np.asarray(open_images(str(folder / "people"), resolution=(50, 100))[0]["image"])
    assert pixels.shape == (50, 100, 3)
    assert pixels[:, :48, 0].min() == 255
    assert pixels[:, 52:, 0].max() == 0


def test_exif_orientation_is_applied(folder):
    assert open_images(str(folder))[2]["image"].size == (100, 60)


def test_resize_is_antialiased(tmp_path):
    checkers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checkers).save(tmp_path / "checkers.png")
    pixels = np.asarray(open_images(str(tmp_path), resolution=16)[0]["image"], float)
    assert np.abs(pixels[2:-2, 2:-2] - 127.5).max() < 8


def test_the_error_names_a_broken_image(folder):
    (folder / "e.jpg").write_bytes(b"no jpeg")
    with pytest.raises(ValueError, match=r"e\.jpg"):
        open_images(str(folder), resolution=8)[3]


HELD_OUT = ["195.jpg"]


def test_held_out_share_depends_on_the_id_alone():
    ids = [f"{i}.jpg" for i in range(20_000)]
    held_out = [is_held_out(i) for i in ids]
    assert 0.017 < np.mean(held_out) < 0.023
    # By the formula that every version has used: a cache that is extended must hold out the same images.
    first_bytes = [int.from_bytes(hashlib.sha256(i.encode()).digest()[:8], "big") for i in ids]
    assert held_out == [number / 2**64 < 0.02 for number in first_bytes]
    assert [i for i, held in zip(ids[:200], held_out, strict=False) if held] == HELD_OUT


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": "nowhere"}, FileNotFoundError, "no such folder"),
        ({"source": "{empty}"}, FileNotFoundError, "no images"),
        ({"source": "avatars", "crop": "face"}, ValueError, "valid names are celeba-178"),
        ({"source": "avatars", "resolution": "big"}, ValueError, "'big' is not a size"),
        ({"source": "avatars", "resolution": 0}, ValueError, "not a size"),
        ({"source": "avatars", "num_images": 0}, ValueError, "num_images=0"),
        ({"source": "avatars", "split": "test"}, ValueError, "avatars has no splits"),
    ],
)
def test_bad_options_are_one_line_errors(tmp_path, options, error, message):
    options["source"] = options["source"].format(empty=tmp_path)
    with pytest.raises(error, match=message):
        open_images(**options)


def test_resolutions():
    assert parse_resolution(64) == (64, 64)
    assert parse_resolution("64x48") == (64, 48)
    assert parse_resolution((64, 48)) == (64, 48)
    assert parse_resolution(None) is None
