"""Test near copies of images: found by a perceptual hash, whatever their format and brightness."""

import numpy as np
import pytest
import skimage.data
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageEnhance

from dit_hf.data import near_duplicates as module
from dit_hf.data.near_duplicates import near_duplicates


@pytest.fixture
def rows(tmp_path):
    """Four photographs; the third is a smaller and brighter copy of the first, the fourth is broken."""
    astronaut = PILImage.fromarray(skimage.data.astronaut())
    astronaut.save(tmp_path / "a.png")
    PILImage.fromarray(skimage.data.coffee()).save(tmp_path / "b.png")
    ImageEnhance.Brightness(astronaut.resize((300, 300))).enhance(1.1).save(tmp_path / "c.jpg", quality=60)
    (tmp_path / "d.jpg").write_bytes(b"no image")
    paths = [str(tmp_path / name) for name in ("a.png", "b.png", "c.jpg", "d.jpg")]
    features = Features({"id": Value("string"), "image": Image(decode=False)})
    return Dataset.from_dict({"id": ["a", "b", "c", "d"], "image": paths}, features)


def test_a_copy_in_another_size_and_brightness_is_found(rows):
    assert near_duplicates(rows) == {2: 0}


def test_chains_of_copies_count_from_the_first_that_is_kept(monkeypatch, rows):
    """A photograph 8 bits from the first is kept, although the one between them is near both."""
    hashes = [0, 0b1111, 0b11111111, 2**64 - 1]
    monkeypatch.setattr(module, "_hash_all", lambda rows: hashes)
    assert near_duplicates(rows) == {1: 0}


def test_unrelated_hashes_are_far_apart():
    """The limit is far below the distance of unrelated images: of 1,000 random hashes no two are near."""
    values = np.random.default_rng(0).integers(0, 2**63, 1000, dtype=np.uint64)
    distances = np.bitwise_count(values[:, None] ^ values)
    assert distances[~np.eye(1000, dtype=bool)].min() > module.MAX_DISTANCE
