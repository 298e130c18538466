import hashlib

import numpy as np
import pytest

from dit_hf import open_images
from dit_hf.data.avatars import ATTRIBUTES, choose_face, render_face


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
