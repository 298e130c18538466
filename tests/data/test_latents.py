import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_vae
from datasets import List, Value, load_from_disk
from PIL import ImageOps

from dit_hf import open_images
from dit_hf.data.latents import load_vae, open_latents, prepare_latents


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_cache_opens_plainly_and_holds_what_the_vae_says(latents):
    cache = load_from_disk(str(latents))
    assert cache.features["latent_mean"] == List(Value("float16"), length=256)
    assert cache.features["Smiling"].dtype == "int8"
    vae, images = tiny_vae(), open_images("avatars", resolution=16, num_images=60)
    assert cache["id"] == images["id"]
    for row in (0, 41):
        for mirrored in (False, True):
            image = ImageOps.mirror(images[row]["image"]) if mirrored else images[row]["image"]
            with torch.no_grad():
                posterior = vae.encode(pixels_of(image)).latent_dist
            suffix = "_flip" if mirrored else ""
            for name, expected in (("latent_mean", posterior.mean), ("latent_std", posterior.std)):
                stored = torch.tensor(cache[row][f"{name}{suffix}"])
                torch.testing.assert_close(stored, expected.flatten(), atol=2e-3, rtol=2e-3)
        assert cache[row]["Male"] == images[row]["Male"]


def test_two_in_a_hundred_are_validation_by_their_id(tmp_path, vae_folder):
    prepare_latents(str(tmp_path / "a"), "avatars", str(vae_folder), "8", num_images=400)
    cache, info = open_latents(tmp_path / "a")
    assert set(cache["split"]) == {"train", "validation"}
    assert info["counts"]["train"] + info["counts"]["validation"] == 400
    assert 2 <= info["counts"]["validation"] <= 18


def test_statistics_are_those_of_posterior_samples(latents):
    cache, info = open_latents(latents)
    mean = np.concatenate([np.array(cache[n], np.float64) for n in ("latent_mean", "latent_mean_flip")])
    std = np.concatenate([np.array(cache[n], np.float64) for n in ("latent_std", "latent_std_flip")])
    rng = np.random.default_rng(0)
    samples = np.stack([mean + std * rng.standard_normal(std.shape) for _ in range(8)]).reshape(8, 120, 4, 64)
    np.testing.assert_allclose(info["statistics"]["mean"], samples.mean((0, 1, 3)), atol=0.02)
    np.testing.assert_allclose(info["statistics"]["std"], samples.std((0, 1, 3)), rtol=0.02)


def test_all_that_training_needs_is_in_the_folder(latents):
    names = {path.name for path in latents.iterdir()}
    assert {"latents.json", "left_out.csv", "README.md", "vae"} <= names
    assert load_vae(str(latents / "vae")).config.latent_channels == 4
    info = json.loads((latents / "latents.json").read_text())
    assert info["latent_shape"] == [4, 8, 8]
    assert info["conditions"]["Smiling"] == 2
    assert not [name for name in names if "partial" in name or name == "building"]


def test_a_second_call_returns_the_cache_and_other_settings_are_refused(latents, vae_folder, capsys):
    before = (latents / "latents.json").stat().st_mtime_ns
    prepare_latents(str(latents), "avatars", str(vae_folder), "16", flip=True, num_images=60)
    assert "already holds" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="num_images=60, now 61"):
        prepare_latents(str(latents), "avatars", str(vae_folder), "16", flip=True, num_images=61)
    assert (latents / "latents.json").stat().st_mtime_ns == before


def test_broken_pictures_are_left_out_and_listed_and_too_many_stop_the_build(tmp_path, vae_folder):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, row in enumerate(open_images("avatars", resolution=16, num_images=150)):
        row["image"].save(folder / f"{i:03}.png")
    (folder / "050.png").write_bytes(b"broken")
    prepare_latents(str(tmp_path / "latents"), str(folder), str(vae_folder), "16")
    cache, info = open_latents(tmp_path / "latents")
    assert len(cache) == 149
    assert "050.png" not in cache["id"]
    assert info["counts"]["left_out"] == 1
    with open(tmp_path / "latents" / "left_out.csv") as file:
        assert next(csv.DictReader(file))["id"] == "050.png"
    for i in range(5):
        (folder / f"{i:03}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"6 of 150 pictures cannot be read.*000\.png"):
        prepare_latents(str(tmp_path / "other"), str(folder), str(vae_folder), "16")
    assert not (tmp_path / "other").exists()


def test_an_unfinished_or_damaged_cache_is_not_read(latents, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(latents, copy)
    data = next(copy.glob("*.arrow"))
    data.write_bytes(data.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged"):
        open_latents(copy)
    with pytest.raises(ValueError, match="no latent cache"):
        open_latents(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": "15"}, "15x15 is not divisible by 2"),
        ({"vae": "/nowhere"}, "no AutoencoderKL there"),
        ({"crop": "left"}, "crop='left'"),
    ],
)
def test_bad_options_say_what_is_wrong(tmp_path, vae_folder, options, message):
    options = {"vae": str(vae_folder), "resolution": "16", "num_images": 2, **options}
    with pytest.raises(ValueError, match=message):
        prepare_latents(str(tmp_path / "out"), "avatars", **options)


def test_a_folder_with_something_else_is_left_alone(tmp_path, vae_folder):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="something else"):
        prepare_latents(str(tmp_path), "avatars", str(vae_folder), "16", num_images=2)
    assert (tmp_path / "mine.txt").read_text() == "mine"
