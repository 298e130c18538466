import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import tiny_vae
from local_hub import running_hub

from dit_hf.data.avatars import choose_face, render_face
from dit_hf.latents.cache import format_identity, open_latents, parse_identity
from dit_hf.latents.prepare import prepare_latents


def test_an_unfinished_or_damaged_cache_is_not_read(latents, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(latents, copy)
    data = next(copy.glob("*.arrow"))
    data.write_bytes(data.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged"):
        open_latents(copy)
    with pytest.raises(ValueError, match="not a latent cache"):
        open_latents(tmp_path)


def test_the_error_names_a_partly_copied_cache(tmp_path, latents, vae_folder):
    shutil.copytree(latents, tmp_path / "half")
    next((tmp_path / "half").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match="damaged: data-"):
        prepare_latents("avatars", str(tmp_path / "half"), str(vae_folder), "16", flip=True, num_images=60)
    (tmp_path / "half" / "latents.json").unlink()
    with pytest.raises(FileExistsError, match=r"holds something else \(no latents\.json\); name a new folder"):
        prepare_latents("avatars", str(tmp_path / "half"), str(vae_folder), "16", flip=True, num_images=60)


def test_a_changed_source_or_vae_is_refused_with_the_difference(tmp_path, vae_folder):
    source = tmp_path / "faces"
    source.mkdir()
    for i in range(6):
        render_face(choose_face(0, i), 32).save(source / f"{i}.png")
    prepare_latents(str(source), str(tmp_path / "latents"), str(vae_folder), "16")
    render_face(choose_face(1, 0), 32).save(source / "5.png")
    with pytest.raises(FileExistsError, match=r"other images: 1 of 6 images have changed, first 5\.png; name"):
        prepare_latents(str(source), str(tmp_path / "latents"), str(vae_folder), "16")
    render_face(choose_face(0, 5), 32).save(source / "5.png")
    other = tiny_vae().requires_grad_(False)
    other.quant_conv.bias += 1
    other.save_pretrained(tmp_path / "vae")
    with pytest.raises(FileExistsError, match=r"vae vae \(\w+\), now vae \(\w+\)"):
        prepare_latents(str(source), str(tmp_path / "latents"), str(tmp_path / "vae"), "16")
    with pytest.raises(FileExistsError, match="crop center, now none"):
        prepare_latents(str(source), str(tmp_path / "latents"), str(vae_folder), "16", crop="none")
    source.rename(tmp_path / "faces2")  # the same images elsewhere are the same
    prepare_latents(str(tmp_path / "faces2"), str(tmp_path / "latents"), str(vae_folder), "16")


def test_identity_keeps_the_spelling_of_format_2():
    written = {
        "format": 2,
        "source": "faces, 3 pictures (x), 60 pictures (64b3bbef2596)",
        "vae": "vae (1) (1e475c2136fa)",
        "crop": "center",
        "resolution": "16x24",
        "flip": False,
    }
    identity = parse_identity(written)
    assert identity["source"] == {"name": "faces, 3 pictures (x)", "num_images": 60, "sha256": "64b3bbef2596"}
    assert identity["vae"] == {"name": "vae (1)", "sha256": "1e475c2136fa"}
    assert identity["resolution"] == {"height": 16, "width": 24}
    assert json.dumps(format_identity(identity)) == json.dumps(written)
    with pytest.raises(ValueError, match="unreadable vae: 'vae'"):
        parse_identity({**written, "vae": "vae"})


def test_a_cache_is_pushed_with_its_card(latents):
    code = """
import sys
from pathlib import Path
from datasets import load_dataset
from huggingface_hub import snapshot_download
from dit_hf.latents.cache import open_latents, push_latents
push_latents(Path(sys.argv[1]), "you/faces", private=True)
rows, info = open_latents(snapshot_download("you/faces", repo_type="dataset"))
assert rows["id"][:] == open_latents(sys.argv[1])[0]["id"][:]
assert load_dataset("you/faces", split="train")["latent_mean"][5] == rows["latent_mean"][5]
try:
    push_latents(Path(sys.argv[1]), "not a name")
except ValueError as error:
    print(error)
"""
    with running_hub() as hub:
        environment = {**os.environ, **hub.environment()}
        command = [sys.executable, "-c", code, str(latents)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "push_to_hub not a name" in done.stdout
    assert hub.private["you/faces"] is True
    files = hub.repositories["datasets/you/faces"]
    assert files["README.md"] == (latents / "README.md").read_bytes()
    assert "reconstructions.png" in files
