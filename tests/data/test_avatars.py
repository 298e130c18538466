import hashlib
from pathlib import Path

import numpy as np
import pytest

from dit_hf import open_images
from dit_hf.data.avatars import ATTRIBUTES, choose_face, open_avatars, render_face


def test_a_face_is_a_pure_function_of_seed_and_number():
    assert choose_face(0, 7) == choose_face(0, 7)
    assert choose_face(0, 7) != choose_face(1, 7)
    assert choose_face(0, 7) != choose_face(0, 8)


def test_images_are_the_same_on_every_machine():
    """The bundled VAE and all recorded figures depend on these images."""
    pixels = b"".join(render_face(choose_face(0, i), 64).tobytes() for i in range(4))
    assert hashlib.sha256(pixels).hexdigest() == IMAGES_SHA256


IMAGES_SHA256 = "8f24f46e9db3fcc9f4b627a9fabf3fe327fcf0940ad0c65986a22ee38c92589c"


def test_the_dataset_does_not_depend_on_the_number_of_processes():
    few = open_images("avatars", resolution=32, num_images=5, seed=3)
    many = open_images("avatars", resolution=32, num_images=450, seed=3)
    assert many.column_names == ["id", "image", *ATTRIBUTES]
    assert len(ATTRIBUTES) == 22
    for i in range(5):
        assert np.array_equal(np.asarray(few[i]["image"]), np.asarray(many[i]["image"]))
        assert few[i]["id"] == many[i]["id"] == f"avatar-3-{i}"
        assert {name: many[i][name] for name in ATTRIBUTES} == choose_face(3, i).attributes


@pytest.mark.parametrize("damage", ["half", "empty", "gone", "flipped"])
def test_avatars_whose_cached_file_is_damaged_are_rendered_again(damage):
    whole = open_images("avatars", resolution=16, num_images=6, seed=5)
    expected = [np.asarray(image) for image in whole["image"]]
    (cached,) = {Path(file["filename"]) for file in open_avatars(6, 16, 5).cache_files}
    data = cached.read_bytes()
    flipped = data[:500] + bytes(byte ^ 255 for byte in data[500:600]) + data[600:]
    cached.unlink()  # and not written over: it is mapped into memory
    if damage != "gone":
        cached.write_bytes({"half": data[: len(data) // 2], "empty": b"", "flipped": flipped}[damage])
    again = open_images("avatars", resolution=16, num_images=6, seed=5)
    assert all(np.array_equal(image, other) for image, other in zip(again["image"], expected, strict=True))


def test_what_cannot_be_rendered_or_kept_is_one_line(monkeypatch):
    with pytest.raises(ValueError, match="num_images=10000000000: expected at most 10,000,000 avatars"):
        open_avatars(10**10, 16, 0)
    with pytest.raises(ValueError, match="resolution=1000000000: expected sides of at most 32,768 pixels"):
        open_images("avatars", resolution=10**9, num_images=1)

    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dit_hf.data.avatars.Dataset.from_generator", fail)
    with pytest.raises(OSError, match="cannot be written; set HF_HOME to a folder that can"):
        open_avatars(7, 16, 5)


def test_every_attribute_varies_and_sex_decides_hair_and_beard():
    faces = [choose_face(0, i).attributes for i in range(2000)]
    for name in ATTRIBUTES:
        assert 0.02 < np.mean([face[name] for face in faces]) < 0.98, name
    women = [face for face in faces if not face["Male"]]
    assert all(face["No_Beard"] and not face["Mustache"] and not face["Bald"] for face in women)


@pytest.fixture(scope="module")
def faces():
    chosen = [choose_face(5, i) for i in range(800)]
    return chosen, np.stack([np.asarray(render_face(face, 24), np.float64) for face in chosen])


@pytest.mark.parametrize("name", ["Eyeglasses", "Smiling", "Wearing_Hat", "Bald", "Pale_Skin"])
def test_attributes_can_be_seen(name, faces):
    """The mean images with and without an attribute differ by more than chance."""
    chosen, pixels = faces
    has = np.array([face.attributes[name] for face in chosen], bool)
    difference = np.abs(pixels[has].mean(0) - pixels[~has].mean(0)).max()
    shuffled = np.random.default_rng(0).permutation(has)
    assert difference > 1.5 * np.abs(pixels[shuffled].mean(0) - pixels[~shuffled].mean(0)).max()
