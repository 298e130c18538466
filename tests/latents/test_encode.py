import dataclasses
import hashlib
import json

import pytest
import torch
from conftest import tiny_vae
from datasets import Features, List, Value, load_from_disk
from diffusers.image_processor import VaeImageProcessor
from PIL import ImageOps

from dit_hf import open_images
from dit_hf.data.transforms import Geometry
from dit_hf.latents.cache import open_latents
from dit_hf.latents.encode import Job, ShardNotes, plan_sizes
from dit_hf.latents.prepare import prepare_latents
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


def test_two_percent_are_held_out_by_their_id(tmp_path, vae_folder):
    prepare_latents("avatars", str(tmp_path / "a"), str(vae_folder), "8", num_images=400)
    cache, info = open_latents(tmp_path / "a")
    assert set(cache["split"]) == {"train", "validation"}
    assert info["counts"]["train"] + info["counts"]["validation"] == 400
    held_out = [int.from_bytes(hashlib.sha256(i.encode()).digest()[:8], "big") / 2**64 < 0.02 for i in cache["id"]]
    assert list(cache["split"]) == ["validation" if held else "train" for held in held_out]
    assert info["counts"]["validation"] == sum(held_out) > 0


@pytest.mark.parametrize(
    ("num_rows", "resolution", "batch_size"),
    [(1, (16, 16), 64), (200_000, (256, 256), 64), (1_000_000, (768, 512), 10), (16_000_000, (4096, 4096), 1)],
)
def test_shards_are_whole_batches_and_at_most_256(num_rows, resolution, batch_size):
    batch, shard = plan_sizes(num_rows, resolution)
    assert batch == batch_size
    assert shard % batch == 0
    assert shard >= 512
    assert num_rows <= 256 * shard


def test_a_finished_shard_is_encoded_again_if_its_file_is_damaged(tmp_path):
    geometry, features = Geometry((16, 16)), Features({"id": Value("string")})
    job = Job(tmp_path, geometry, (4, 8, 8), False, False, features, 40, batch_size=8, shard_size=16, sha256="0")
    assert job.unfinished() == [0, 1, 2]
    assert [len(job.rows_of(shard)) for shard in (0, 1, 2)] == [16, 16, 8]
    (tmp_path / "building").mkdir()
    for shard in (0, 1):
        job.path(shard).write_bytes(b"latents")
        notes = ShardNotes(size=7, sha256=sha256(job.path(shard)))
        job.notes_path(shard).write_text(json.dumps(dataclasses.asdict(notes)))
    assert job.unfinished() == [2]
    job.path(1).write_bytes(b"damaged")
    assert job.unfinished() == [1, 2]
    job.path(0).unlink()
    assert job.unfinished() == [0, 1, 2]
