import hashlib
import re
import shutil

from PIL import Image

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


def test_copies_of_training_images_among_those_held_out_are_counted(tmp_path, vae_folder, capsys):
    for i, name in enumerate(("train/a", "train/b", "val/a", "val/c", "test/d")):
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i * 40, 0, 0)).save(path)
    shutil.copy(tmp_path / "images/train/b.png", tmp_path / "images/val/other.png")
    for _ in range(2):  # the second call finds the cache finished
        prepare_latents(str(tmp_path / "images"), str(tmp_path / "cache"), str(vae_folder), "8")
        sentence = (
            "1 of 3 validation images are training images too, by content (first val/other.png is train/b.png): "
            "what is measured on them is too good"
        )
        assert f"warning: {sentence}\n" in (printed := capsys.readouterr().out)
        assert printed.count("warning") == 1
    assert f"| copies | {sentence} |" in (tmp_path / "cache/README.md").read_text()
    _, info = open_latents(tmp_path / "cache")
    assert info["copies"] == {"validation": {"count": 1, "first": ["val/other.png", "train/b.png"]}}
