import json
import math
from importlib.resources import files

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from dit_hf import open_images
from dit_hf.latents.train_autoencoder import psnr, train_autoencoder
from dit_hf.latents.vae import BUNDLED, decode, encode, load_vae


@pytest.mark.parametrize(("resolution", "latents"), [(64, 16), pytest.param(128, 32, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "db"), [("avatar", 32), ("avatar-robust", 29)])
def test_bundled_vae_reconstructs_new_avatars(name, db, resolution, latents):
    vae = load_vae(name)
    assert psnr(vae, open_images("avatars", resolution=resolution, num_images=100, seed=4711)) >= db
    shape = vae.encode(torch.zeros(1, 3, resolution, resolution)).latent_dist.mean.shape
    assert shape == (1, 4, latents, latents)
    assert unit(vae, resolution) == pytest.approx(1, rel=0.03)


def unit(vae, resolution):
    """Return the standard deviation of the scaled latents of 100 avatars."""
    pixels = pixels_of(4711, 100, resolution).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        return (vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor).std().item()


def test_robust_vae_has_the_latents_of_the_other_and_corrects_noisy_ones():
    robust, other, pixels = load_vae("avatar-robust"), load_vae("avatar"), pixels_of(4711, 50, 64)
    latents, _ = encode(other, pixels)
    assert torch.equal(encode(robust, pixels)[0], latents)
    assert robust.config.scaling_factor == other.config.scaling_factor
    assert error_of_noisy(robust, pixels, 0.3) < 0.6 * error_of_noisy(other, pixels, 0.3)


@pytest.mark.parametrize("name", BUNDLED.values())
def test_bundled_vae_is_small_and_documents_its_origin(name):
    folder = files("dit_hf") / "assets" / name
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


def train(folder, steps, **options):
    """Train on 200 avatars of 32 px, and return the VAE as it is loaded again."""
    options = {"resolution": 32, "num_images": 200, "train_batch_size": 8, "learning_rate": 1e-3, **options}
    train_autoencoder("avatars", str(folder), max_train_steps=steps, **options)
    return load_vae(str(folder))


def pixels_of(seed, count, resolution=32):
    faces = open_images("avatars", resolution=resolution, num_images=count, seed=seed)["image"]
    return torch.stack([torch.from_numpy(np.array(face)) for face in faces])  # uint8 [count, height, width, 3]


def error_of_noisy(vae, pixels, level):
    """Return the squared error of images decoded from latents with noise of `level` times their standard deviation."""
    latents = encode(vae, pixels)[0].float()
    noise = level * latents.std() * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    return (decode(vae, latents + noise).float() - pixels.float()).square().mean().item()


def test_decoder_trained_with_noise_corrects_noisy_latents_of_the_same_encoder(tmp_path):
    before, pixels = load_vae("avatar"), pixels_of(4711, 50)
    after = train(tmp_path / "x", 60, init_from="avatar", decoder_only=True, latent_noise=0.5)
    latents, _ = encode(before, pixels)
    assert torch.equal(encode(after, pixels)[0], latents)
    assert after.config.scaling_factor == before.config.scaling_factor
    assert error_of_noisy(after, pixels, 0.4) < 0.8 * error_of_noisy(before, pixels, 0.4)
    settings = json.loads((tmp_path / "x" / "training.json").read_text())["settings"]
    assert (settings["init_from"], settings["decoder_only"], settings["latent_noise"]) == ("avatar", True, 0.5)


def test_larger_kl_weight_leaves_less_in_the_latents(tmp_path):
    widths = []
    for weight in (1e-4, 1.0):
        vae = train(tmp_path / f"{weight}", 25, init_from="avatar", kl_weight=weight)
        mean, std = encode(vae, pixels_of(4711, 20))
        widths.append((std.float().mean() / mean.float().std()).item())
    assert widths[1] > 10 * widths[0]


def test_training_from_an_earlier_vae_keeps_its_architecture_and_refuses_others(tmp_path):
    AutoencoderTiny().save_pretrained(tmp_path / "tiny")
    with pytest.raises(ValueError, match=r"init_from .*tiny: expected an AutoencoderKL, got AutoencoderTiny"):
        train(tmp_path / "x", 1, init_from=str(tmp_path / "tiny"))
    with pytest.raises(ValueError, match="decoder_only keeps an encoder"):
        train(tmp_path / "x", 1, decoder_only=True)
    wide = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**wide, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=6, use_quant_conv=False)
    vae.save_pretrained(tmp_path / "wide")
    trained = train(tmp_path / "x", 1, init_from=str(tmp_path / "wide"), decoder_only=True)
    assert trained.config.latent_channels == 6
    assert str(tmp_path) not in (tmp_path / "x" / "training.json").read_text()
    assert str(tmp_path) not in (tmp_path / "x" / "config.json").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 30}, "divisible by 4"),
        ({"kl_weight": -1.0}, "kl_weight=-1 must be at least 0"),
        ({"latent_noise": -0.1}, "latent_noise=-0.1 must be at least 0"),
        ({"latent_noise": math.nan}, "latent_noise=nan must be at least 0"),
        ({"num_images": 5}, "5 images are too few for batches of 16"),
        ({"learning_rate": 0.0}, "learning_rate=0 must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be above 0"),
        ({"train_batch_size": 0}, "train_batch_size=0 must be at least 1"),
        ({"mixed_precision": "fp8"}, "expected no or bf16"),
    ],
)
def test_bad_options_are_one_line_errors(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train_autoencoder("avatars", str(tmp_path / "out"), **{"resolution": 16, "num_images": 50, **options})
