import pytest
from PIL import Image

from dit_hf import open_images


@pytest.fixture
def folder(tmp_path):
    """Images in color, in grey and with a palette, and a text file."""
    (tmp_path / "people").mkdir()
    Image.new("RGB", (178, 218), "red").save(tmp_path / "people" / "b.png")
    Image.new("L", (40, 60), 128).save(tmp_path / "a.png")
    Image.new("P", (30, 30)).save(tmp_path / "c.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_is_rgb_of_one_size_in_the_order_of_names(folder):
    images = open_images(str(folder), resolution="32x24")
    assert images["id"] == ["a.png", "c.png", "people/b.png"]
    assert all(row["image"].size == (24, 32) and row["image"].mode == "RGB" for row in images)
    assert len(open_images(str(folder), num_images=2)) == 2


def test_columns_can_be_selected_and_images_are_decoded_only_if_they_are(folder):
    (folder / "b.jpg").write_bytes(b"no jpeg")
    images = open_images(str(folder), resolution=8)
    assert images.select_columns("id")[:] == {"id": ["a.png", "b.jpg", "c.png", "people/b.png"]}
    assert images.select_columns("image")[0]["image"].size == (8, 8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": "nowhere"}, FileNotFoundError, "no such folder"),
        ({"source": "{empty}"}, FileNotFoundError, "no images"),
        ({"source": "avatars", "crop": "square"}, ValueError, "valid names are face, celeba-178"),
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
