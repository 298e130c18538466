import json
import shutil

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from PIL import Image

from dit_hf import open_images
from dit_hf.latents.card import write_cache_card
from dit_hf.latents.vae import load_vae


def test_the_card_and_the_image_grid(latents):
    card = (latents / "README.md").read_text()
    info = json.loads((latents / "latents.json").read_text())
    assert f"{info['counts']['train']:,} train" in card
    assert f"PSNR {info['psnr']:.1f} dB" in card
    cache, vae = load_from_disk(str(latents)), load_vae(str(latents / "vae"))
    images = open_images("avatars", resolution=16, num_images=60)
    ratios = []
    for row in np.linspace(0, 59, 16).round().astype(int).tolist():
        with torch.no_grad():
            decoded = vae.decode(torch.tensor(cache[row]["latent_mean"]).view(1, 4, 8, 8)).sample
        pixels = (decoded[0].permute(1, 2, 0).numpy() * 127.5 + 127.5).clip(0, 255).round()
        ratios.append(10 * np.log10(255**2 / np.mean((pixels - np.asarray(images[row]["image"], float)) ** 2)))
    assert info["psnr"] == pytest.approx(np.mean(ratios), abs=0.06)
    with Image.open(latents / "reconstructions.png") as grid:
        assert grid.width > 700


def test_the_card_counts_the_images_left_out_by_reason(latents, tmp_path):
    info = json.loads((latents / "latents.json").read_text())
    info["counts"]["left_out"] = 1003
    shutil.copytree(latents, tmp_path / "copy")
    left_out = [(f"{i}.jpg", "truncated") for i in range(1000)] + [(f"{i}.png", "not an image") for i in range(3)]
    write_cache_card(tmp_path / "copy", info, left_out, ["faces: folder of images", "  images      60 train"])
    assert "| 1,003: 1000 x truncated; 3 x not an image (" in (tmp_path / "copy" / "README.md").read_text()
