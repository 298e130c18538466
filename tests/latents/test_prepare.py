import csv
import json
import re
import shutil

import numpy as np
import pytest
from celeba import make_celeba
from conftest import small_disk
from filelock import FileLock
from PIL import Image

from dit_hf import open_images
from dit_hf.data.avatars import ATTRIBUTES
from dit_hf.latents import shards
from dit_hf.latents.cache import open_latents
from dit_hf.latents.encode import ShardEncoder
from dit_hf.latents.prepare import prepare_latents
from dit_hf.latents.vae import load_vae
from dit_hf.storage import sha256
from dit_hf_cli import main


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
    with pytest.raises(FileExistsError, match=r"source was avatars, 60 images.* and is avatars, 61 images"):
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
    options = {"vae": str(vae_folder), "resolution": "16", "missing": "leave_out"}
    with pytest.raises(ValueError, match="4 of 250 images cannot be used"):
        prepare_latents(str(folder), str(tmp_path / "all"), **options)
    prepare_latents(str(folder), str(tmp_path / "train"), **options, split="train")
    assert open_latents(tmp_path / "train")[1]["counts"]["left_out"] == 2
    prepare_latents(str(folder), str(tmp_path / "few"), **options, split="train", num_images=20)
    assert sum(open_latents(tmp_path / "few")[1]["counts"][name] for name in ("train", "validation")) == 20


def test_the_error_names_images_of_an_unsupported_format(tmp_path, vae_folder):
    folder = folder_of_avatars(tmp_path, 20)
    (folder / "IMG_1.JXL").write_bytes(b"\xff\x0a")
    with pytest.raises(ValueError, match=r"1 of 21 images .*IMG_1\.JXL: \.jxl is not read: convert it"):
        prepare_latents(str(folder), str(tmp_path / "latents"), str(vae_folder), "16")


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
    with pytest.raises(FileExistsError, match=r"unfinished cache .* source was avatars, 70 .* and is avatars, 80"):
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


def test_two_builds_of_one_cache_are_locked_out(tmp_path, vae_folder):
    (tmp_path / ".latents.partial" / "building").mkdir(parents=True)
    with (
        FileLock(tmp_path / ".latents.partial" / "building" / "lock"),
        pytest.raises(FileExistsError, match="being written by another process"),
    ):
        prepare_latents("avatars", str(tmp_path / "latents"), str(vae_folder), "16", num_images=4)


def test_a_full_disk_is_one_line_and_the_build_resumes_with_more_room(tmp_path, vae_folder, capsys):
    options = ["--vae", str(vae_folder), "--resolution", "64", "--num_images", "40"]
    options += ["--source", "avatars", "--output_dir", str(tmp_path / "latents")]
    with small_disk(100_000):
        assert main(["prepare-latents", *options]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("dit-hf prepare-latents: error: output_dir")
    assert "make room and call again" in error
    assert "Traceback" not in error
    assert not (tmp_path / "latents").exists()
    assert main(["prepare-latents", *options]) == 0
    assert len(open_latents(tmp_path / "latents")[0]) == 40


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
