"""The images of a reference, read by row number, of which some may be broken."""

import numpy as np
import pytest
import torch

from dit_hf import open_images
from dit_hf.data.contents import SourceOptions
from dit_hf.data.transforms import Geometry
from dit_hf.evaluation.features import load_features
from dit_hf.evaluation.reference import load_reference, reference
from dit_hf.evaluation.reference_images import open_reference_images
from dit_hf.latents.cache import open_latents
from dit_hf.latents.vae import decode, load_vae


def test_a_broken_image_is_left_out_and_too_many_are_an_error(net, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number, image in enumerate(open_images("avatars", 16, num_images=120)["image"]):
        image.save(images / f"{number:03d}.png")
    (images / "007.png").write_bytes(b"nothing")
    loaded = load_reference(reference(str(images), str(tmp_path / "one"), net, resolution="16"))
    assert loaded.rows.tolist() == [row for row in range(120) if row != 7]
    alone = load_reference(reference(str(images), str(tmp_path / "alone"), net, resolution="16", batch_size=1))
    assert alone.rows.tolist() == loaded.rows.tolist()
    (images / "008.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"2 of 120 images .* cannot be read \(007\.png"):
        reference(str(images), str(tmp_path / "two"), net, resolution="16")


def test_a_latent_cache_is_decoded(latents, net, tmp_path):
    loaded = load_reference(reference(str(latents), str(tmp_path / "statistics"), net, batch_size=16))
    cache, _ = open_latents(latents)
    stored = np.array(cache["latent_mean"][:16], np.float32).reshape(-1, 4, 8, 8)
    decoded = decode(load_vae(str(latents / "vae")), torch.from_numpy(stored)).numpy()
    np.testing.assert_allclose(loaded.features[:16], load_features(net)(decoded), atol=1e-3)
    assert "decoded" in loaded.info["pictures"]["source"]


def test_a_part_of_the_images_is_spread_over_all_of_them():
    """A source may be sorted by class."""
    images = open_reference_images("avatars", Geometry((16, 16)), SourceOptions(num_images=50))
    part = images.spread(20)
    rows = [0, 2, 5, 7, 10]
    assert np.array_equal(part.read(range(5)), images.read(rows))
    assert [part.conditions["Male"][row] for row in range(5)] == [images.conditions["Male"][row] for row in rows]
    assert (part.count, part.summary["pictures"], part.summary["spread_over"]) == (20, 20, 50)
    assert images.spread(50) is images
