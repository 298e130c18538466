"""Test caches of photographs: one row a face, what is left out, near duplicates, and the grid of crops."""

import csv
import hashlib
import json

import pytest
import skimage.data
from PIL import Image, ImageEnhance

from dit_hf.latents.cache import NOT_PUSHED, open_latents
from dit_hf.latents.prepare import prepare_latents


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photographs of one person, of two and of none, and a brightened copy of the first."""
    folder = tmp_path_factory.mktemp("photos")
    astronaut = Image.fromarray(skimage.data.astronaut())
    face = astronaut.crop((120, 20, 330, 230))
    two = Image.new("RGB", (500, 300), "gray")
    two.paste(face, (20, 40))
    two.paste(face.resize((120, 120)), (300, 60))
    astronaut.save(folder / "a.jpg", quality=90)
    two.save(folder / "b.png")
    Image.fromarray(skimage.data.coffee()).save(folder / "c.png")
    ImageEnhance.Brightness(astronaut).enhance(1.1).save(folder / "d.jpg", quality=70)
    (folder / "metadata.csv").write_text("file_name,Smiling\na.jpg,1\nb.png,1\nc.png,0\nd.jpg,0\n")
    return folder


@pytest.fixture(scope="module")
def cache(photos, tmp_path_factory):
    """The cache of their faces, at 16 px."""
    folder = tmp_path_factory.mktemp("caches") / "latents"
    prepare_latents(str(photos), str(folder), "avatar", "16", crop="face", min_face_size=120)
    return folder


def test_a_cache_has_a_row_for_each_face(cache):
    rows, info = open_latents(cache)
    assert rows["id"][:] == ["a.jpg#0", "b.png#0", "d.jpg#0"]
    assert rows["Smiling"][:] == [1, 1, 0]
    with open(cache / "left_out.csv", newline="") as file:
        assert list(csv.reader(file))[1:] == [["b.png#1", "face too small"], ["c.png", "no face"]]
    assert info["plan"]["faces"] == "4 photos: 3 faces, 1 without a face, 1 faces too small"
    assert "1 images are near copies of others (first d.jpg of a.jpg)" in info["plan"]["choices"][0]
    assert info["identity"]["faces"].startswith("all of at least 120 px, version 1, detector ")
    assert Image.open(cache / "faces.png").width > 900


def test_a_second_call_returns_the_cache_of_faces(cache, photos, capsys):
    prepare_latents(str(photos), str(cache), "avatar", "16", crop="face", min_face_size=120)
    assert "already holds" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"faces was all of at least 120 px.* and is all of at least 100 px"):
        prepare_latents(str(photos), str(cache), "avatar", "16", crop="face", min_face_size=100)


def test_conditions_of_several_faces_are_null(photos, tmp_path):
    prepare_latents(
        str(photos), str(tmp_path / "x"), "avatar", "16", crop="face", min_face_size=80, drop_near_duplicates=True
    )
    rows, info = open_latents(tmp_path / "x")
    assert rows["id"][:] == ["a.jpg#0", "b.png#0", "b.png#1"]
    assert rows["Smiling"][:] == [1, None, None]
    assert "1 photos have several faces, whose Smiling is null" in info["plan"]["choices"][-1]
    left_out = (tmp_path / "x" / "left_out.csv").read_text().splitlines()
    assert left_out[1:] == ["d.jpg,near duplicate of an earlier image", "c.png,no face"]


def test_nothing_of_a_photographs_metadata_is_kept(tmp_path):
    """Neither GPS nor camera is in any file of a cache."""
    folder = tmp_path / "photos"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x010F] = "Secretcam"
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.3)
    Image.fromarray(skimage.data.astronaut()).save(folder / "a.jpg", exif=exif, comment=b"Secretcam")
    prepare_latents(str(folder), str(tmp_path / "x"), "avatar", "16", crop="face")
    written = [path for path in (tmp_path / "x").rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not [path for path in written if b"Secretcam" in path.read_bytes()]
    assert not Image.open(tmp_path / "x" / "faces.png").getexif()
    assert "a.jpg#0" in json.dumps(open_latents(tmp_path / "x")[0]["id"][:])


@pytest.mark.parametrize(("given", "private"), [({}, True), ({"private": False}, False)])
def test_a_cache_of_faces_is_pushed_as_private(cache, photos, monkeypatch, given, private):
    pushed = []
    monkeypatch.setattr("dit_hf.latents.prepare.push_latents", lambda *options: pushed.append(options))
    options = {"crop": "face", "min_face_size": 120, "push_to_hub": "you/faces", **given}
    prepare_latents(str(photos), str(cache), "avatar", "16", **options)
    assert pushed == [(cache, "you/faces", private)]


def test_anonymous_ids_name_no_file(tmp_path):
    """No file of the cache that is uploaded holds a name; a copy of an image is kept once."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("Ada Lovelace.png", "Ada again.png"):
        Image.fromarray(skimage.data.astronaut()).save(folder / name)
    (folder / "Ada broken.png").write_bytes(b"no image")
    options = {"crop": "face", "anonymous_ids": True, "max_left_out": 0.5}
    prepare_latents(str(folder), str(tmp_path / "x"), "avatar", "16", **options)
    rows, _ = open_latents(tmp_path / "x")
    digest = hashlib.sha256((folder / "Ada again.png").read_bytes()).hexdigest()[:20]
    assert rows["id"][:] == [f"{digest}#0"]
    uploaded = [path for path in (tmp_path / "x").rglob("*") if path.is_file() and path.name not in NOT_PUSHED]
    assert not [path for path in uploaded if b"Ada" in path.read_bytes()]
    assert "Ada again.png,copy of an earlier image" in (tmp_path / "x" / "left_out.csv").read_text()
