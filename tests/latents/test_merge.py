"""Parts of a cache that are built apart and joined."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, load_from_disk
from growing import build, copy_source, hashes, save_images

from dit_hf.config import Config
from dit_hf.latents import shards
from dit_hf.latents.cache import open_latents
from dit_hf.latents.encode import ShardEncoder
from dit_hf.latents.merge import merge_latents
from dit_hf.runs import read_log
from dit_hf.training.trainer import train
from dit_hf_cli import main

OF = 4


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "MIN_SHARD", 4)
    monkeypatch.setattr(shards, "MAX_BATCH", 4)


@pytest.fixture
def images(tmp_path) -> Path:
    """70 images of two classes, one broken; 18 shards of 4."""
    for i, name in enumerate(("cat", "owl")):
        save_images(tmp_path / "images" / name, range(i * 35, i * 35 + 35))
    (tmp_path / "images/cat/007.png").write_bytes(b"broken")
    (tmp_path / "images/owl/036.jxl").write_bytes(b"\xff\x0a")  # a format that is not read
    return tmp_path / "images"


OPTIONS = {"max_left_out": 0.2, "flip": True}


def build_parts(images: Path, vae_folder: Path, count: int = OF, **options) -> list[str]:
    """Build the parts, each of a copy of the source, as on a machine of its own."""
    parts = []
    for number in range(1, count + 1):
        copied = copy_source(images, images.parent / f"machine-{number}" / "images")
        parts.append(str(build(copied, vae_folder, part=f"{number}/{count}", **OPTIONS, **options)))
    return parts


def summary(folder: Path) -> dict:
    """Return what `latents.json` says, without the grids of images, which are those of the first part."""
    info = open_latents(folder, hashes=True)[1]
    del info["psnr"], info["files"]["reconstructions.png"], info["files"]["README.md"]
    return info


def test_parts_are_joined_to_the_cache_that_is_built_at_once(images, vae_folder, tmp_path, capsys):
    whole = build(images, vae_folder, "whole", **OPTIONS)
    parts = build_parts(images, vae_folder)
    sizes = [len(load_from_disk(part)) for part in parts]
    assert sum(sizes) == len(load_from_disk(str(whole))) == 69
    assert max(sizes) - min(sizes) <= 4
    assert main(["merge-latents", *reversed(parts), "--output_dir", str(tmp_path / "merged")]) == 0
    assert "merged: 4 parts, 68 train, 1 validation images, 2 left out\n" in capsys.readouterr().out
    merged, one = tmp_path / "merged", hashes(whole)
    two = hashes(merged)
    for name in ("reconstructions.png", "README.md", "latents.json"):  # the grid, and its PSNR
        del one[name], two[name]
    del one["source_files.npz"]  # of the machine that read the files
    assert one == two  # shards, index, VAE, list of images left out
    assert summary(merged) == summary(whole)
    texts = [(folder / "README.md").read_text().splitlines() for folder in (whole, merged)]
    same = [line for line in texts[0] if "PSNR" not in line and "begin contents" not in line]
    assert set(same) <= set(texts[1])
    assert all(os.path.samefile(merged / path.name, path) for part in parts for path in Path(part).glob("*.arrow"))

    # A build of the whole source finds its cache, and so does a second call.
    shutil.move(merged, images.parent / "latents")
    build(images, vae_folder, **OPTIONS)
    merge_latents(parts, str(images.parent / "latents"))
    assert capsys.readouterr().out.count("already holds") == 2


def test_a_training_on_joined_parts_is_the_same(images, vae_folder, tmp_path, config: Config):
    whole = build(images, vae_folder, "whole", **OPTIONS)
    merged = merge_latents(build_parts(images, vae_folder), str(tmp_path / "merged"))
    config.train.max_train_steps, config.train.logging_steps = 3, 1
    losses = []
    for folder in (whole, merged):
        config.data.latents, config.train.output_dir = str(folder), str(tmp_path / f"run-{folder.name}")
        losses.append([row["loss"] for row in read_log(train(config))])
    assert losses[0] == losses[1]


def test_parts_of_parquet_shards(tmp_path, vae_folder):
    source = tmp_path / "images"
    source.mkdir()
    files = save_images(tmp_path / "files", range(40))
    for shard in range(20):
        paths = [files / f"{i:03}.png" for i in (2 * shard, 2 * shard + 1)]
        rows = {"image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths], "smiling": [0, 1]}
        Dataset.from_dict(
            rows, Features({"image": Image(), **Dataset.from_dict({"smiling": [0]}).features})
        ).to_parquet(source / f"{shard:03}.parquet")
    whole = open_latents(build(source, vae_folder, "whole", **OPTIONS))
    merged = open_latents(merge_latents(build_parts(source, vae_folder), str(tmp_path / "merged")), hashes=True)
    assert merged[0].to_dict() == whole[0].to_dict()
    assert merged[1]["content_sha256"] == whole[1]["content_sha256"]


class Stopped(Exception):
    pass


def test_an_interrupted_part_resumes_and_an_interrupted_merge_begins_again(images, vae_folder, tmp_path, monkeypatch):
    parts = build_parts(images, vae_folder)
    before = hashes(Path(parts[1]))
    shutil.rmtree(parts[1])
    encode, calls = ShardEncoder._encode_batch, []

    def stop(self, *others):
        calls.append(1)
        if len(calls) == 3:
            raise Stopped
        return encode(self, *others)

    monkeypatch.setattr(ShardEncoder, "_encode_batch", stop)
    source = Path(parts[1]).parent / "images"
    with pytest.raises(Stopped):
        build(source, vae_folder, part="2/4", **OPTIONS)
    with pytest.raises(FileExistsError, match=r"unfinished cache of other settings: part was 2/4 and is None"):
        build(source, vae_folder, **OPTIONS)
    build(source, vae_folder, part="2/4", **OPTIONS)
    assert hashes(Path(parts[1])) == before
    assert len(calls) == 3 + 3  # its five shards, one of which was begun twice

    (tmp_path / ".merged.partial" / "building" / "index").mkdir(parents=True)
    (tmp_path / ".merged.partial" / "data-00000-of-00018.arrow").write_bytes(b"half")
    merged = merge_latents(parts, str(tmp_path / "merged"))
    again = merge_latents(parts, str(tmp_path / "again"))
    assert hashes(merged) == hashes(again)
    assert not (tmp_path / ".merged.partial").exists()


def test_what_is_no_set_of_parts_is_one_line(images, vae_folder, tmp_path, capsys):
    parts = build_parts(images, vae_folder, 2)
    whole = str(build(images, vae_folder, "whole", **OPTIONS))
    (source := copy_source(images, tmp_path / "other" / "images") / "owl/100.png").write_bytes(
        (images / "owl/040.png").read_bytes()
    )
    other = str(build(source.parents[1], vae_folder, part="2/2", **OPTIONS))
    third = str(build(images, vae_folder, "third", part="2/3", **OPTIONS))
    labels = copy_source(images, tmp_path / "labels" / "images")
    (labels / "owl").rename(labels / "zoo")
    renamed = str(build(labels, vae_folder, part="2/2", **OPTIONS))
    damaged = Path(shutil.copytree(parts[1], tmp_path / "damaged"))
    data = bytearray((damaged / "part.json").read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / "part.json").write_bytes(data)
    capsys.readouterr()
    for given, message in [
        ([parts[0]], "part 2/2 missing of 2"),
        ([parts[1], parts[1], parts[0]], f"part 2/2 is given twice: {parts[1]} and {parts[1]}"),
        ([whole, parts[1]], f"{whole} is not a part: it was built without --part"),
        ([parts[0], other], f"{other} is not of the same cache as {parts[0]}: source was images, 70 images"),
        ([parts[0], third], f"{third} is not of the same cache as {parts[0]}: part was of 2 and is of 3"),
        ([parts[0], renamed], f"{renamed} is not of the same cache as {parts[0]}: source was"),
        ([parts[0], str(damaged)], "is damaged: part.json has changed in content"),
        ([str(images), parts[0]], f"{images} is not a latent cache"),
    ]:
        assert main(["merge-latents", *given, "--output_dir", str(tmp_path / "merged")]) == 1
        (error,) = capsys.readouterr().err.splitlines()
        assert message in error
        assert not (tmp_path / "merged").exists()
    with pytest.raises(FileExistsError, match=r"output_dir .* holds something else"):
        merge_latents(parts, str(images))
    (tmp_path / ".begun.partial" / "building").mkdir(parents=True)
    (tmp_path / ".begun.partial" / "building" / "identity.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"output_dir .*begun belongs to a build that is not finished"):
        merge_latents(parts, str(tmp_path / "begun"))
    with pytest.raises(FileExistsError, match="holds a cache of other settings: source was images, 71"):
        merge_latents(parts, other)
    with pytest.raises(ValueError, match=r"latents is part 2/2 of a cache; dit-hf merge-latents joins"):
        build(images, vae_folder, "grown", add_to=renamed, **OPTIONS)


def test_parts_of_other_content_under_the_same_names_are_another_cache(images, vae_folder, tmp_path):
    parts = build_parts(images, vae_folder, 2)
    merged = merge_latents(parts, str(tmp_path / "merged"))
    save_images(images / "owl", range(40, 41), seed=1)
    shutil.rmtree(tmp_path / "machine-1")
    shutil.rmtree(tmp_path / "machine-2")
    with pytest.raises(FileExistsError, match=r"output_dir .*merged holds a cache of other images; name a new folder"):
        merge_latents(build_parts(images, vae_folder, 2), str(merged))


def test_numbers_of_parts_are_checked_before_any_work(images, vae_folder):
    for part in ("0/4", "5/4", "1", "1/0", "a/b"):
        with pytest.raises(ValueError, match=rf"part={part}: expected K/N, part K of N, such as 3/8"):
            build(images, vae_folder, part=part)
    with pytest.raises(ValueError, match="part=1/19: 70 images make 18 shards of 4, so at most 18 parts"):
        build(images, vae_folder, part="1/19", **OPTIONS)
    with pytest.raises(ValueError, match="part and push_to_hub: a part is not pushed"):
        build(images, vae_folder, part="1/2", push_to_hub="you/faces")
    assert [path.name for path in images.parent.iterdir()] == ["images"]


def test_validation_is_held_out_of_the_whole_source(tmp_path, vae_folder):
    """One part has no validation image, but the source has."""
    for split, numbers in (("train", range(30)), ("val", range(30, 32))):
        save_images(tmp_path / "images" / split, numbers)
    merged = merge_latents(build_parts(tmp_path / "images", vae_folder, 8), str(tmp_path / "merged"))
    assert open_latents(merged)[1]["counts"] == {"train": 30, "validation": 2, "test": 0, "left_out": 0}


def test_joined_parts_grow(images, vae_folder, tmp_path):
    merged = merge_latents(build_parts(images, vae_folder), str(tmp_path / "merged"))
    save_images(images / "cat", range(200, 203))
    grown = build(images, vae_folder, "grown", add_to=str(merged), **OPTIONS)
    cache, info = open_latents(grown, hashes=True)
    assert cache["id"][69:] == [f"cat/{i}.png" for i in range(200, 203)]
    whole = open_latents(build(images, vae_folder, "whole", **OPTIONS))[1]
    for name, values in info["statistics"].items():
        np.testing.assert_allclose(values, whole["statistics"][name], rtol=1e-5)
    assert json.loads((grown / "latents.json").read_text())["grown"]["from"] == [
        open_latents(merged)[1]["content_sha256"]
    ]
