"""Test caches of photographs: one row a face, what is left out, near duplicates, and the grid of crops."""

import csv
import hashlib
import json
import shutil

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageEnhance, ImageOps

from dit_hf import open_images
from dit_hf.latents import shards
from dit_hf.latents.cache import NOT_PUSHED, open_latents
from dit_hf.latents.encode import ShardEncoder
from dit_hf.latents.merge import merge_latents
from dit_hf.latents.prepare import prepare_latents
from dit_hf.storage import sha256


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


def test_photographs_are_added(cache, photos, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(photos, folder)
    ImageOps.mirror(Image.fromarray(skimage.data.astronaut())).save(folder / "e.png")
    with open(folder / "metadata.csv", "a") as file:
        file.write("e.png,0\n")
    options = {"crop": "face", "min_face_size": 120}
    grown = prepare_latents(str(folder), str(tmp_path / "grown"), "avatar", "16", add_to=str(cache), **options)
    rows, info = open_latents(grown, hashes=True)
    assert rows["id"][:] == ["a.jpg#0", "b.png#0", "d.jpg#0", "e.png#0"]
    assert rows["latent_mean"][:3] == open_latents(cache)[0]["latent_mean"][:]
    # The photograph without a face is tried again.
    assert info["plan"]["added"] == ["2 of 5 images, to the 3 of latents"]
    assert info["plan"]["faces"] == "2 photos: 1 faces, 1 without a face, 0 faces too small"
    assert (grown / "faces.png").is_file()
    with pytest.raises(ValueError, match="nothing to add"):
        prepare_latents(str(folder), str(tmp_path / "more-yet"), "avatar", "16", add_to=str(grown), **options)


@pytest.fixture
def many_photos(tmp_path):
    """Twenty photographs of no, one and two people in turn."""
    folder = tmp_path / "many"
    folder.mkdir()
    face = Image.fromarray(skimage.data.astronaut()).crop((120, 20, 330, 230)).resize((120, 120))
    for number in range(20):
        photo = Image.new("RGB", (280, 140), (12 * number, 128, 128))
        for person in range(number % 3):
            photo.paste(face, (10 + 140 * person, 5 + number % 10))
        photo.save(folder / f"{number:02}.png")
    return folder


class Stopped(Exception):
    pass


@pytest.mark.slow
def test_processes_and_an_interruption_make_the_same_cache_of_faces(tmp_path, many_photos, monkeypatch):
    """Photographs have no, one or several rows, which must not depend on who encodes them and when."""
    options = {"vae": "avatar", "resolution": "16", "crop": "face", "min_face_size": 40}
    monkeypatch.setattr(shards, "MIN_SHARD", 8)
    monkeypatch.setattr(shards, "MAX_BATCH", 8)
    encoded, encode = [], ShardEncoder._encode_batch

    def stop_in_the_third_shard(self, table, *others):
        encoded.append(table)
        if len(encoded) == 3:
            raise Stopped
        return encode(self, table, *others)

    monkeypatch.setattr(ShardEncoder, "_encode_batch", stop_in_the_third_shard)
    with pytest.raises(Stopped):
        prepare_latents(str(many_photos), str(tmp_path / "one"), **options)
    one = prepare_latents(str(many_photos), str(tmp_path / "one"), **options)
    two = prepare_latents(str(many_photos), str(tmp_path / "two"), **options, num_proc=2)
    rows, info = open_latents(one)
    assert rows["id"][:] == [f"{number:02}.png#{face}" for number in range(20) for face in range(number % 3)]
    assert info["plan"]["faces"] == "20 photos: 19 faces, 7 without a face, 0 faces too small"
    hashes = [{path.name: sha256(path) for path in folder.glob("*") if path.is_file()} for folder in (one, two)]
    assert hashes[0] == hashes[1]
    assert len(list(one.glob("data-*.arrow"))) == 3


def test_an_iphones_photograph_is_turned_before_its_face_is_sought(tmp_path):
    """HEIC, stored on its side with an orientation, as a phone held upright does."""
    folder = tmp_path / "photos"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    upright = Image.fromarray(skimage.data.astronaut())
    on_its_side = upright.transpose(Image.Transpose.ROTATE_90)
    on_its_side.save(folder / "IMG_1.HEIC", format="HEIF", exif=exif.tobytes(), quality=90)
    upright.save(folder / "IMG_2.png")
    faces = open_images(str(folder), 64, crop="face")
    assert faces["id"] == ["IMG_1.HEIC#0", "IMG_2.png#0"]
    heic, png = (np.asarray(image, float) for image in faces["image"])
    assert np.abs(heic - png).mean() < 4


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


def test_parts_of_photographs_are_joined(many_photos, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MIN_SHARD", 4)
    monkeypatch.setattr(shards, "MAX_BATCH", 4)
    (many_photos / "metadata.csv").write_text(
        "file_name,Smiling\n" + "".join(f"{number:02}.png,{number % 2}\n" for number in range(20))
    )
    options = {"crop": "face", "min_face_size": 60}
    whole = prepare_latents(str(many_photos), str(tmp_path / "whole"), "avatar", "16", **options)
    parts = [
        str(prepare_latents(str(many_photos), str(tmp_path / f"part-{k}"), "avatar", "16", part=f"{k}/2", **options))
        for k in (1, 2)
    ]
    merged = merge_latents(parts, str(tmp_path / "merged"))
    (one, one_info), (two, two_info) = open_latents(whole), open_latents(merged, hashes=True)
    assert one.to_dict() == two.to_dict()
    assert two_info["plan"] == one_info["plan"]
    assert "several faces, whose Smiling is null" in json.dumps(two_info["plan"])
    assert (merged / "left_out.csv").read_bytes() == (whole / "left_out.csv").read_bytes()
