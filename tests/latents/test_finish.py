import hashlib
import re

from dit_hf.latents.cache import open_latents
from dit_hf.latents.prepare import prepare_latents


def test_two_percent_are_held_out_by_their_id(tmp_path, vae_folder):
    prepare_latents("avatars", str(tmp_path / "a"), str(vae_folder), "8", num_images=400)
    cache, info = open_latents(tmp_path / "a")
    assert set(cache["split"]) == {"train", "validation"}
    assert info["counts"]["train"] + info["counts"]["validation"] == 400
    held_out = [int.from_bytes(hashlib.sha256(i.encode()).digest()[:8], "big") / 2**64 < 0.02 for i in cache["id"]]
    assert list(cache["split"]) == ["validation" if held else "train" for held in held_out]
    assert info["counts"]["validation"] == sum(held_out) > 0


def test_the_quality_of_the_reconstructions_is_named(tmp_path, vae_folder, capsys):
    prepare_latents("avatars", str(tmp_path / "poor"), str(vae_folder), "16", num_images=4)
    assert re.search(r"reconstructions\.png: PSNR \d+\.\d dB, poor", capsys.readouterr().out)
    assert re.search(r"PSNR \d+\.\d dB .*, poor", (tmp_path / "poor" / "README.md").read_text())
    prepare_latents("avatars", str(tmp_path / "good"), "avatar", "64", num_images=4)
    assert re.search(r"PSNR 3\d\.\d dB, very good", capsys.readouterr().out)
