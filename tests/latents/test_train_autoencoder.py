import json
from importlib.resources import files

import numpy as np
import pytest
import torch

from dit_hf import open_images
from dit_hf.latents.train_autoencoder import psnr, train_autoencoder
from dit_hf.latents.vae import load_vae


@pytest.mark.parametrize(("resolution", "latents"), [(64, 16), pytest.param(128, 32, marks=pytest.mark.slow)])
def test_bundled_vae_reconstructs_new_avatars(resolution, latents):
    vae = load_vae("avatar")
    assert psnr(vae, open_images("avatars", resolution=resolution, num_images=100, seed=4711)) >= 32
    shape = vae.encode(torch.zeros(1, 3, resolution, resolution)).latent_dist.mean.shape
    assert shape == (1, 4, latents, latents)
    assert unit(vae, resolution) == pytest.approx(1, rel=0.03)


def unit(vae, resolution):
    """Return the standard deviation of the scaled latents of 100 avatars."""
    faces = open_images("avatars", resolution=resolution, num_images=100, seed=4711)["image"]
    pixels = torch.stack([torch.from_numpy(np.array(face)).permute(2, 0, 1) / 127.5 - 1 for face in faces])
    with torch.no_grad():
        return (vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor).std().item()


def test_bundled_vae_is_small_and_documents_its_origin():
    folder = files("dit_hf") / "assets" / "avatar_vae"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000
    assert "train-autoencoder" in (folder / "README.md").read_text()
    assert json.loads((folder / "training.json").read_text())["settings"]["source"] == "avatars"


def test_training_lowers_the_error(tmp_path):
    options = {"resolution": 16, "num_images": 200, "train_batch_size": 8}
    scores = []
    for steps in (1, 60):
        train_autoencoder("avatars", str(tmp_path / str(steps)), max_train_steps=steps, **options)
        scores.append(json.loads((tmp_path / str(steps) / "training.json").read_text())["psnr_db"])
    assert scores[1] > scores[0] + 2
    vae = load_vae(str(tmp_path / "60"))
    assert vae.dtype == torch.float32
    assert unit(vae, 16) == pytest.approx(1, rel=0.1)
    with pytest.raises(FileExistsError, match="not empty"):
        train_autoencoder("avatars", str(tmp_path / "60"), max_train_steps=1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 30}, "divisible by 4"),
        ({"num_images": 5}, "5 images are too few for batches of 16"),
        ({"learning_rate": 0.0}, "learning_rate=0 must be above 0"),
        ({"train_batch_size": 0}, "train_batch_size=0 must be at least 1"),
        ({"mixed_precision": "fp8"}, "expected no or bf16"),
    ],
)
def test_bad_options_are_one_line_errors(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train_autoencoder("avatars", str(tmp_path / "out"), **{"resolution": 16, "num_images": 50, **options})
