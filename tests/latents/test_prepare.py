import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from celeba import make_celeba
from conftest import tiny_vae
from datasets import List, Value, load_from_disk
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from filelock import FileLock
from local_hub import running_hub
from PIL import Image, ImageOps

from dit_hf import LatentDiTPipeline, open_images
from dit_hf.cli import main
from dit_hf.data.avatars import ATTRIBUTES, choose_face, render_face
from dit_hf.latents import shards
from dit_hf.latents.cache import format_identity, open_latents, parse_identity
from dit_hf.latents.encode import ShardEncoder
from dit_hf.latents.prepare import prepare_latents
from dit_hf.latents.vae import load_vae
from dit_hf.storage import sha256
from dit_hf.training.trainer import train


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_a_cache_opens_with_datasets_and_holds_the_vae_s_latents(latents):
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


def test_two_percent_are_held_out_by_their_id(tmp_path, vae_folder):
    prepare_latents("avatars", str(tmp_path / "a"), str(vae_folder), "8", num_images=400)
    cache, info = open_latents(tmp_path / "a")
    assert set(cache["split"]) == {"train", "validation"}
    assert info["counts"]["train"] + info["counts"]["validation"] == 400
    held_out = [int.from_bytes(hashlib.sha256(i.encode()).digest()[:8], "big") / 2**64 < 0.02 for i in cache["id"]]
    assert list(cache["split"]) == ["validation" if held else "train" for held in held_out]
    assert info["counts"]["validation"] == sum(held_out) > 0


def test_statistics_are_those_of_posterior_samples(latents):
    cache, info = open_latents(latents)
    mean = np.concatenate([np.array(cache[n], np.float64) for n in ("latent_mean", "latent_mean_flip")])
    std = np.concatenate([np.array(cache[n], np.float64) for n in ("latent_std", "latent_std_flip")])
    rng = np.random.default_rng(0)
    samples = np.stack([mean + std * rng.standard_normal(std.shape) for _ in range(8)]).reshape(8, 120, 4, 64)
    np.testing.assert_allclose(info["statistics"]["mean"], samples.mean((0, 1, 3)), atol=0.02)
    np.testing.assert_allclose(info["statistics"]["std"], samples.std((0, 1, 3)), rtol=0.02)


def test_the_folder_holds_everything_that_training_needs(latents):
    names = {path.name for path in latents.iterdir()}
    assert {"latents.json", "left_out.csv", "README.md", "vae"} <= names
    assert load_vae(str(latents / "vae")).config.latent_channels == 4
    info = json.loads((latents / "latents.json").read_text())
    assert info["latent_shape"] == [4, 8, 8]
    assert info["conditions"]["Smiling"] == 2
    assert not [name for name in names if "partial" in name or name == "building"]


def test_a_second_call_returns_the_cache_and_other_settings_are_refused(latents, vae_folder, capsys):
    before = (latents / "latents.json").stat().st_mtime_ns
    prepare_latents("avatars", str(latents), str(vae_folder), "16", flip=True, num_images=60)
    assert "already holds" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"source avatars, 60 images.*, now avatars, 61 images"):
        prepare_latents("avatars", str(latents), str(vae_folder), "16", flip=True, num_images=61)
    assert (latents / "latents.json").stat().st_mtime_ns == before


def folder_of_avatars(tmp_path, count):
    """Write `count` images, 000.png and so on, and return their folder."""
    folder = tmp_path / "faces"
    folder.mkdir()
    for i, row in enumerate(open_images("avatars", resolution=16, num_images=count)):
        row["image"].save(folder / f"{i:03}.png")
    return folder


def test_broken_images_are_listed_and_too_many_stop_the_build(tmp_path, vae_folder):
    folder = folder_of_avatars(tmp_path, 150)
    (folder / "050.png").write_bytes(b"broken")
    prepare_latents(str(folder), str(tmp_path / "latents"), str(vae_folder), "16")
    cache, info = open_latents(tmp_path / "latents")
    assert len(cache) == 149
    assert "050.png" not in cache["id"]
    assert info["counts"]["left_out"] == 1
    with open(tmp_path / "latents" / "left_out.csv") as file:
        assert next(csv.DictReader(file))["id"] == "050.png"
    for i in range(5):
        (folder / f"{i:03}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"6 of 150 images cannot be used.*000\.png"):
        prepare_latents(str(folder), str(tmp_path / "other"), str(vae_folder), "16")
    assert not (tmp_path / "other").exists()


def test_faults_of_another_split_do_not_stop_the_build(tmp_path, vae_folder):
    folder, rows = folder_of_avatars(tmp_path, 250), ["file_name,split,Smiling"]
    for i in range(250):
        split = "test" if i >= 200 else "train"
        rows.append(f"{i:03}.png,{split},{'' if i in (0, 1, 210, 211) else i % 2}")
    (folder / "metadata.csv").write_text("\n".join(rows))
    options = (str(vae_folder), "16")
    with pytest.raises(ValueError, match="4 of 250 images cannot be used"):
        prepare_latents(str(folder), str(tmp_path / "all"), *options)
    prepare_latents(str(folder), str(tmp_path / "train"), *options, split="train")
    assert open_latents(tmp_path / "train")[1]["counts"]["left_out"] == 2
    prepare_latents(str(folder), str(tmp_path / "few"), *options, split="train", num_images=20)
    assert sum(open_latents(tmp_path / "few")[1]["counts"][name] for name in ("train", "validation")) == 20


def test_the_error_names_images_of_an_unsupported_format(tmp_path, vae_folder):
    folder = folder_of_avatars(tmp_path, 20)
    (folder / "IMG_1.HEIC").write_bytes(b"ftypheic")
    with pytest.raises(ValueError, match=r"1 of 21 images .*IMG_1\.HEIC: \.heic is not read: convert it"):
        prepare_latents(str(folder), str(tmp_path / "latents"), str(vae_folder), "16")


def test_an_unfinished_or_damaged_cache_is_not_read(latents, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(latents, copy)
    data = next(copy.glob("*.arrow"))
    data.write_bytes(data.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged"):
        open_latents(copy)
    with pytest.raises(ValueError, match="not a latent cache"):
        open_latents(tmp_path)


def test_celeba_with_every_kind_of_bad_image(tmp_path, vae_folder, capsys):
    """Unusable images are counted and listed, and all others are encoded."""
    celeba = make_celeba(tmp_path / "celeba", 60)
    options = ["--source", str(celeba.folder), "--crop", "celeba-140", "--resolution", "16", "--vae", str(vae_folder)]
    command = ["prepare-latents", *options, "--output_dir", str(tmp_path / "latents")]
    assert main(command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"8 of 7\d images cannot be used, more than max_left_out=0.01", error)
    assert main([*command, "--max_left_out", "0.3"]) == 0
    cache, info = open_latents(tmp_path / "latents")
    assert cache["id"][:] == list(celeba.attributes)
    for row in cache.select_columns(["id", "split", *ATTRIBUTES]):
        assert row["split"] == celeba.splits[row["id"]]
        assert {name: row[name] for name in ATTRIBUTES} == celeba.attributes[row["id"]]
    counts = {split: list(celeba.splits.values()).count(split) for split in ("train", "validation", "test")}
    assert info["counts"] == {**counts, "left_out": len(celeba.left_out)}
    with open(tmp_path / "latents" / "left_out.csv", newline="", encoding="utf-8") as file:
        left_out = {row["id"]: row["reason"] for row in csv.DictReader(file)}
    assert set(left_out) == set(celeba.left_out)
    assert all(reason in left_out[name] for name, reason in celeba.left_out.items())
    assert not any(str(tmp_path) in reason for reason in left_out.values())
    assert str(tmp_path) not in (tmp_path / "latents" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "latents" / "latents.json").read_text()


def other_vaes():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "mid_block_add_attention": False}
    plain = {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    tiny = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
    tiny |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    deep = {f"{part}_block_out_channels": (8, 16) for part in ("encoder", "decoder")}
    deep |= {f"{part}_layers_per_block": (1, 1) for part in ("encoder", "decoder")}
    deep |= {f"{part}_qkv_multiscales": ((), ()) for part in ("encoder", "decoder")}
    return {
        "kl-16": AutoencoderKL(latent_channels=16, **blocks, **sizes, **plain),
        "tiny": AutoencoderTiny(**tiny),
        "dc": AutoencoderDC(latent_channels=8, attention_head_dim=4, scaling_factor=0.4, **deep),
    }


@pytest.mark.parametrize("kind", ["kl-16", "tiny", "dc"])
def test_other_vaes_and_training_on_their_latents(tmp_path, config, kind):
    vae = other_vaes()[kind].eval()
    vae.save_pretrained(tmp_path / "vae")
    prepare_latents("avatars", str(tmp_path / "latents"), str(tmp_path / "vae"), "16", num_images=40)
    cache, info = open_latents(tmp_path / "latents")
    pixels = pixels_of(open_images("avatars", resolution=16, num_images=40)[3]["image"])
    with torch.no_grad():
        encoded = vae.encode(pixels)
    expected = {
        "kl-16": lambda: encoded.latent_dist.mean,
        "tiny": lambda: encoded.latents,
        "dc": lambda: encoded.latent,
    }
    latent = expected[kind]()
    assert info["latent_shape"] == list(latent.shape[1:])
    torch.testing.assert_close(torch.tensor(cache[3]["latent_mean"]), latent.flatten(), atol=2e-3, rtol=2e-3)
    assert ("latent_std" in cache.column_names) == (kind == "kl-16")
    assert info["shift_factor"] == (0.1159 if kind == "kl-16" else 0.0)
    config.data.latents, config.train.max_train_steps = str(tmp_path / "latents"), 2
    pipeline = LatentDiTPipeline.from_pretrained(train(config) / "pipeline")
    images = pipeline(batch_size=1, num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


def hashes(folder):
    return {path.name: sha256(path) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "MIN_SHARD", 16)
    monkeypatch.setattr(shards, "MAX_BATCH", 8)


class Stopped(Exception):
    pass


def test_a_resumed_build_gives_the_same_bytes(tmp_path, vae_folder, small_shards, monkeypatch):
    options = (str(vae_folder), "16")
    whole = prepare_latents("avatars", str(tmp_path / "whole"), *options, num_images=70)
    encoded, encode = [], ShardEncoder._encode_batch

    def stop_in_the_third_shard(self, table, *others):
        encoded.append(table["id"][0])
        if len(encoded) == 6:
            raise Stopped
        return encode(self, table, *others)

    monkeypatch.setattr(ShardEncoder, "_encode_batch", stop_in_the_third_shard)
    with pytest.raises(Stopped):
        prepare_latents("avatars", str(tmp_path / "stopped"), *options, num_images=70)
    assert not (tmp_path / "stopped").exists()
    partial = tmp_path / ".stopped.partial"
    finished = {path: path.stat().st_mtime_ns for path in partial.glob("data-*.arrow")}
    assert len(finished) == 2
    with pytest.raises(FileExistsError, match=r"unfinished cache of source avatars, 70 .*, now avatars, 80"):
        prepare_latents("avatars", str(tmp_path / "stopped"), *options, num_images=80)
    (partial / "building" / "tmp123").write_bytes(b"half a shard")  # what a kill leaves of a shard begun
    resumed = prepare_latents("avatars", str(tmp_path / "stopped"), *options, num_images=70)
    assert hashes(resumed) == hashes(whole)
    assert len(encoded) == 6 + 5  # batches of 8: two shards of two stay, the rest of 70 is encoded
    assert not partial.exists()
    for path, changed in finished.items():
        assert (resumed / path.name).stat().st_mtime_ns == changed


def test_a_complete_build_is_put_in_place(tmp_path, latents, vae_folder):
    shutil.copytree(latents, tmp_path / ".latents.partial")
    prepare_latents("avatars", str(tmp_path / "latents"), str(vae_folder), "16", flip=True, num_images=60)
    assert hashes(tmp_path / "latents") == hashes(latents)


def test_processes_make_the_same_cache(tmp_path, vae_folder):
    one = prepare_latents("avatars", str(tmp_path / "one"), str(vae_folder), "8", num_images=600)
    two = prepare_latents("avatars", str(tmp_path / "two"), str(vae_folder), "8", num_images=600, num_proc=2)
    assert hashes(one) == hashes(two)
    assert len(list(one.glob("*.arrow"))) == 2


def test_two_builds_of_one_cache_are_locked_out(tmp_path, vae_folder):
    (tmp_path / ".latents.partial" / "building").mkdir(parents=True)
    with (
        FileLock(tmp_path / ".latents.partial" / "building" / "lock"),
        pytest.raises(FileExistsError, match="being written by another process"),
    ):
        prepare_latents("avatars", str(tmp_path / "latents"), str(vae_folder), "16", num_images=4)


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
    other_vaes()["tiny"].save_pretrained(tmp_path / "vae")
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


def run_limited(limit: str, *options: str) -> subprocess.CompletedProcess:
    """Build a cache in a process that runs `limit` first."""
    code = f"import resource, sys; {limit}; from dit_hf.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "prepare-latents", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_full_disk_is_one_line_and_the_build_resumes_with_more_room(tmp_path, vae_folder):
    options = ["--vae", str(vae_folder), "--resolution", "128", "--num_images", "40"]
    options += ["--source", "avatars", "--output_dir", str(tmp_path / "latents")]
    failed = run_limited("resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))", *options)
    assert failed.returncode == 1
    error = failed.stderr.splitlines()[-1]
    assert error.startswith("dit-hf prepare-latents: error: output_dir")
    assert "make room and call again" in error
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "latents").exists()
    assert run_limited("pass", *options).returncode == 0
    assert len(open_latents(tmp_path / "latents")[0]) == 40


def test_the_error_names_a_partly_copied_cache(tmp_path, latents, vae_folder):
    shutil.copytree(latents, tmp_path / "half")
    next((tmp_path / "half").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match="damaged: data-"):
        prepare_latents("avatars", str(tmp_path / "half"), str(vae_folder), "16", flip=True, num_images=60)
    (tmp_path / "half" / "latents.json").unlink()
    with pytest.raises(FileExistsError, match=r"holds something else \(no latents\.json\); name a new folder"):
        prepare_latents("avatars", str(tmp_path / "half"), str(vae_folder), "16", flip=True, num_images=60)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": "15"}, "15x15 is not divisible by 2"),
        ({"vae": "/nowhere"}, "no VAE could be loaded"),
        ({"crop": "left"}, "crop='left'"),
    ],
)
def test_bad_options_are_one_line_errors(tmp_path, vae_folder, options, message):
    options = {"vae": str(vae_folder), "resolution": "16", "num_images": 2, **options}
    with pytest.raises(ValueError, match=message):
        prepare_latents("avatars", str(tmp_path / "out"), **options)


def test_unusable_sources_are_one_line_errors(tmp_path, vae_folder):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"no image of broken can be used: a\.png: not an image"):
        prepare_latents(str(tmp_path / "broken"), str(tmp_path / "out"), str(vae_folder), "16", max_left_out=1.0)
    Image.new("RGB", (16, 16)).save(tmp_path / "broken" / "a.png")
    (tmp_path / "broken" / "metadata.csv").write_text("file_name,latent_mean\na.png,1\n")
    with pytest.raises(ValueError, match="the source has a column latent_mean, which is a column of the cache too"):
        prepare_latents(str(tmp_path / "broken"), str(tmp_path / "other"), str(vae_folder), "16")


def test_a_folder_with_other_files_is_left_alone(tmp_path, vae_folder):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="something else"):
        prepare_latents("avatars", str(tmp_path), str(vae_folder), "16", num_images=2)
    assert (tmp_path / "mine.txt").read_text() == "mine"
