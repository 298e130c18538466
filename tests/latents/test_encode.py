"""Encoding: sizes, memory, estimates and interruption."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from conftest import tiny_vae
from datasets import Features, List, Value, load_from_disk
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps

from dit_hf import open_images
from dit_hf.data.transforms import Geometry
from dit_hf.latents import prepare
from dit_hf.latents.cache import open_latents
from dit_hf.latents.prepare import prepare_latents
from dit_hf.latents.shards import Job, ShardNotes
from dit_hf.latents.vae import encode
from dit_hf.storage import sha256


def test_a_cache_opens_with_datasets_and_holds_the_vae_s_latents(latents):
    cache = load_from_disk(str(latents))
    assert cache.features["latent_mean"] == List(Value("float16"), length=256)
    assert cache.features["Smiling"].dtype == "int8"
    processor = VaeImageProcessor(do_resize=False)
    vae, images = tiny_vae(), open_images("avatars", resolution=16, num_images=60)
    assert cache["id"] == images["id"]
    for row in (0, 41):
        for mirrored in (False, True):
            image = ImageOps.mirror(images[row]["image"]) if mirrored else images[row]["image"]
            with torch.no_grad():
                posterior = vae.encode(processor.preprocess(image)).latent_dist
            suffix = "_flip" if mirrored else ""
            for name, expected in (("latent_mean", posterior.mean), ("latent_std", posterior.std)):
                stored = torch.tensor(cache[row][f"{name}{suffix}"])
                torch.testing.assert_close(stored, expected.flatten(), atol=2e-3, rtol=2e-3)
        assert cache[row]["Male"] == images[row]["Male"]


def test_a_finished_shard_is_encoded_again_if_its_file_is_damaged(tmp_path):
    geometry, features = Geometry((16, 16)), Features({"id": Value("string")})
    sizes = {"batch_size": 8, "shard_size": 16, "sha256": "0", "total": 3}
    job = Job(tmp_path, geometry, (4, 8, 8), False, False, features, 40, **sizes)
    assert job.unfinished() == [0, 1, 2]
    assert [len(job.rows_of(shard)) for shard in (0, 1, 2)] == [16, 16, 8]
    (tmp_path / "building").mkdir()
    for shard in (0, 1):
        job.path(shard).write_bytes(b"latents")
        notes = ShardNotes(size=7, sha256=sha256(job.path(shard)))
        job.notes_path(shard).write_text(json.dumps(dataclasses.asdict(notes)))
    assert job.unfinished() == [2]
    job.path(1).write_bytes(b"damaged")
    job.forget_damaged()
    assert job.unfinished() == [1, 2]
    job.notes_path(0).write_text("[]")
    job.forget_damaged()
    assert job.unfinished() == [0, 1, 2]


def narrow_stable_diffusion_vae() -> AutoencoderKL:
    """Stable Diffusion's VAE with random weights and a 16th of its width."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(block_out_channels=(8, 16, 32, 32), norm_num_groups=8, layers_per_block=2, **blocks).eval()


def test_512_px_with_a_vae_of_stable_diffusion_s_shape(tmp_path):
    vae = narrow_stable_diffusion_vae()
    vae.save_pretrained(tmp_path / "vae")
    prepare_latents("avatars", str(tmp_path / "latents"), str(tmp_path / "vae"), "512", num_images=2)
    cache, info = open_latents(tmp_path / "latents")
    assert info["latent_shape"] == [4, 64, 64]
    # Both at once, as they were encoded: with random weights, flat areas amplify the rounding of another batch size.
    images = open_images("avatars", resolution=512, num_images=2)["image"]
    mean, std = encode(vae, torch.from_numpy(np.stack([np.asarray(image) for image in images])))
    torch.testing.assert_close(torch.tensor(cache[1]["latent_mean"]), mean[1].float().flatten(), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(torch.tensor(cache[1]["latent_std"]), std[1].float().flatten(), atol=2e-3, rtol=2e-3)


class SmallMemory(AutoencoderKL):
    """A VAE on a machine whose memory holds three images of 16 px."""

    def encode(self, x, *args, **kwargs):
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().encode(x, *args, **kwargs)


def test_the_batch_is_halved_when_memory_runs_out_and_that_is_said_once(tmp_path, vae_folder, monkeypatch, capsys):
    options = ("avatars", str(tmp_path / "whole"), str(vae_folder), "16")
    prepare_latents(*options, num_images=30)
    vae = SmallMemory.from_pretrained(vae_folder).eval().requires_grad_(False)
    vae.register_to_config(_name_or_path="vae")
    monkeypatch.setattr(prepare, "load_vae", lambda *_: vae)
    prepare_latents("avatars", str(tmp_path / "halved"), str(vae_folder), "16", num_images=30)
    out = capsys.readouterr().out
    assert out.count("out of memory") == 1
    assert "encoding 3 images at once from here on (--batch_size)" in out
    whole, halved = (load_from_disk(str(tmp_path / name)) for name in ("whole", "halved"))
    np.testing.assert_allclose(halved["latent_mean"], whole["latent_mean"], atol=2e-3)


def test_batch_size_changes_no_file_but_by_rounding(tmp_path, vae_folder):
    for size in (None, 1, 7):
        out = str(tmp_path / str(size))
        prepare_latents("avatars", out, str(vae_folder), "16", num_images=20, batch_size=size)
    caches = [load_from_disk(str(tmp_path / str(size))) for size in (None, 1, 7)]
    for cache in caches[1:]:
        assert cache["id"][:] == caches[0]["id"][:]
        np.testing.assert_allclose(cache["latent_mean"], caches[0]["latent_mean"], atol=2e-3)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        prepare_latents("avatars", str(tmp_path / "out"), str(vae_folder), "16", batch_size=0)


@pytest.mark.slow
def test_ctrl_c_while_processes_start_is_one_line_and_leaves_nothing_running(tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    for i in range(600):
        Image.new("RGB", (32, 32), (i % 256, 99, 30)).save(source / f"{i:03}.bmp")
    options = ["--source", str(source), "--vae", "avatar", "--resolution", "256", "--num_proc", "2"]
    command = [sys.executable, "-m", "dit_hf", "prepare-latents", *options, "--output_dir", str(tmp_path / "latents")]
    for seconds in (0.0, 4.0):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        workers: list[psutil.Process] = []
        while len(workers) < 2:
            assert process.poll() is None
            children = psutil.Process(process.pid).children(recursive=True)
            workers = [child for child in children if any("spawn_main" in word for word in child.cmdline())]
            time.sleep(0.05)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in error
        lines = [line for line in re.split(r"[\r\n]+", error) if line and not line.startswith("encoding:")]
        assert len(lines) <= 3, error
        assert lines[-1] == "dit-hf prepare-latents: interrupted"
        assert not psutil.wait_procs(children, timeout=5)[1]
