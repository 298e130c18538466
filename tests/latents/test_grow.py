"""Caches to which images are added."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset, load_from_disk
from growing import build, copy_source, hashes, save_images

from dit_hf.data.splits import is_held_out
from dit_hf.latents import reuse, shards
from dit_hf.latents.cache import open_latents
from dit_hf.latents.encode import ShardEncoder
from dit_hf.latents.reader import LatentReader
from dit_hf.latents.shards import open_shards, shard_files
from dit_hf.storage import sha256
from dit_hf_cli import main


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "MIN_SHARD", 16)
    monkeypatch.setattr(shards, "MAX_BATCH", 8)


@pytest.fixture
def images(tmp_path) -> Path:
    """40 images; `grown` has 20 more, between them by name too."""
    save_images(tmp_path / "images", range(0, 80, 2))
    return tmp_path / "images"


@pytest.fixture
def latents(images, vae_folder) -> Path:
    return build(images, vae_folder)


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The ids of the images that are encoded from here on."""
    ids: list[str] = []
    encode = ShardEncoder._encode_batch

    def count(self, table, *others):
        ids.extend(table["id"].to_pylist())
        return encode(self, table, *others)

    monkeypatch.setattr(ShardEncoder, "_encode_batch", count)
    return ids


def rows_of(folder: Path) -> dict[str, list]:
    return load_from_disk(str(folder)).to_dict()


def test_only_new_images_are_encoded_and_the_rows_of_the_others_keep_bytes_and_places(
    images, latents, vae_folder, encoded, capsys
):
    before, files = rows_of(latents), hashes(latents)
    save_images(images, range(1, 41, 2))
    grown = build(images, vae_folder, "grown", add_to=str(latents))
    assert encoded == [f"{i:03}.png" for i in range(1, 41, 2)]
    assert "  added       20 of 60 images, to the 40 of latents\n" in capsys.readouterr().out
    after = rows_of(grown)
    assert {name: values[:40] for name, values in after.items()} == before
    assert after["id"][40:] == encoded
    assert after["image_sha256"][40:] == [sha256(images / name) for name in encoded]
    for one, other in zip(shard_files(latents), shard_files(grown), strict=False):
        assert os.path.samefile(one, other)  # no disk for what is there
    assert [path.name for path in shard_files(grown)] == [f"data-{i:05}-of-00005.arrow" for i in range(5)]
    assert hashes(latents) == files
    assert load_dataset(str(_without_state(grown)), split="train", cache_dir=f"{grown}-cache")["id"] == after["id"]

    # The values are those of a cache that is built at once, and so are figures and counts.
    whole, whole_info = open_latents(build(images, vae_folder, "whole"), hashes=True)
    rows = dict(zip(whole["id"], whole["latent_mean"], strict=True))
    np.testing.assert_allclose([rows[name] for name in after["id"]], after["latent_mean"], atol=2e-3)
    _, info = open_latents(grown, hashes=True)
    assert info["counts"] == whole_info["counts"]
    for name, values in info["statistics"].items():
        assert values == pytest.approx(whole_info["statistics"][name], rel=1e-5)
    assert (
        f"{info['counts']['train']} train, {info['counts']['validation']} validation"
        in (grown / "README.md").read_text()
    )
    held_out = ["validation" if is_held_out(name) else "train" for name in after["id"]]
    assert after["split"] == held_out


def _without_state(folder: Path) -> Path:
    """Copy a cache as `load_dataset` opens it, by its card."""
    copy = Path(shutil.copytree(folder, folder.with_name("by-card")))
    (copy / "state.json").unlink()
    return copy


def test_a_cache_grows_again_and_a_second_call_finds_it(images, latents, vae_folder, encoded, capsys):
    save_images(images, range(1, 21, 2))
    grown = build(images, vae_folder, "grown", add_to=str(latents))
    del encoded[:]
    before = (grown / "latents.json").stat().st_mtime_ns
    build(images, vae_folder, "grown", add_to=str(latents))
    assert "already holds" in capsys.readouterr().out
    assert (grown / "latents.json").stat().st_mtime_ns == before
    save_images(images, range(21, 31, 2))
    more = build(images, vae_folder, "more", add_to=str(grown))
    assert encoded == [f"{i:03}.png" for i in range(21, 31, 2)]
    assert rows_of(more)["id"] == [f"{i:03}.png" for step in (range(0, 80, 2), range(1, 31, 2)) for i in step]
    with pytest.raises(FileExistsError, match=r"other settings: source was images, 50 images .* and is images, 55"):
        build(images, vae_folder, "grown", add_to=str(latents))


def test_files_that_have_not_changed_are_not_read(images, latents, vae_folder, monkeypatch):
    read: list[str] = []
    read_image = reuse.read_image

    def note(stored):
        read.append(Path(stored["path"]).name)
        return read_image(stored)

    monkeypatch.setattr(reuse, "read_image", note)
    save_images(images, range(1, 5, 2))
    grown = build(images, vae_folder, "grown", add_to=str(latents))
    assert sorted(read) == ["001.png", "003.png"]
    del read[:]
    save_images(images, range(5, 7, 2))
    build(images, vae_folder, "more", add_to=str(grown))
    assert read == ["005.png"]


def test_images_are_known_by_content_in_copied_and_renamed_files(images, latents, vae_folder, encoded, capsys):
    copied = copy_source(images, images.with_name("copied"))
    (copied / "000.png").rename(copied / "renamed.png")
    save_images(copied, range(1, 3, 2))
    grown = build(copied, vae_folder, "grown", add_to=str(latents))
    assert encoded == ["001.png"]
    assert rows_of(grown)["id"][:2] == ["000.png", "002.png"]
    assert "gone" not in capsys.readouterr().out


def test_images_inside_shards_are_known_by_content(tmp_path, vae_folder, encoded):
    from datasets import Dataset, Features, Image

    source = tmp_path / "shards"
    source.mkdir()
    folder = save_images(tmp_path / "files", range(10))
    data = [{"bytes": (folder / f"{i:03}.png").read_bytes(), "path": f"{i}.png"} for i in range(10)]
    for name, part in (("a", data[:6]), ("b", data[6:])):
        if name == "b":
            latents = build(source, vae_folder)
            del encoded[:]
        Dataset.from_dict({"image": part}, Features({"image": Image()})).to_parquet(source / f"{name}.parquet")
    grown = build(source, vae_folder, "grown", add_to=str(latents))
    assert len(encoded) == 4
    assert rows_of(grown)["image_sha256"] == [sha256(folder / f"{i:03}.png") for i in range(10)]


def test_images_that_are_gone_are_named_and_stay(images, latents, vae_folder, capsys):
    for name in ("010.png", "030.png"):
        (images / name).unlink()
    save_images(images, range(1, 3, 2))
    capsys.readouterr()
    grown = build(images, vae_folder, "grown", add_to=str(latents))
    gone = "  added       2 images of latents are gone and stay (--drop_gone drops them): 010.png, 030.png\n"
    assert gone in capsys.readouterr().out
    assert rows_of(grown)["id"] == [*rows_of(latents)["id"], "001.png"]
    assert "gone and stay" in json.dumps(open_latents(grown)[1]["plan"])


@pytest.mark.parametrize("flip", [False, True])
def test_images_that_are_gone_are_dropped_in_place(images, vae_folder, flip):
    latents = build(images, vae_folder, flip=flip)
    for name in ("010.png", "030.png"):
        (images / name).unlink()
    save_images(images, range(1, 3, 2))
    grown = build(images, vae_folder, "grown", flip=flip, add_to=str(latents), drop_gone=True)
    before, after = rows_of(latents), rows_of(grown)
    kept = [row for row, name in enumerate(before["id"]) if name not in ("010.png", "030.png")]
    assert {name: values[:-1] for name, values in after.items()} == {
        name: [values[row] for row in kept] for name, values in before.items()
    }
    assert after["id"][-1] == "001.png"
    whole = open_latents(build(images, vae_folder, "whole", flip=flip))[1]
    info = open_latents(grown, hashes=True)[1]
    assert info["counts"] == whole["counts"]
    for name, values in info["statistics"].items():
        assert values == pytest.approx(whole["statistics"][name], rel=1e-5)
    # The first shard of 16 has both; the others are the same files.
    same = [os.path.samefile(*pair) for pair in zip(shard_files(latents), shard_files(grown), strict=False)]
    assert same == [False, True, True]
    assert not [path for path in grown.rglob("*") if "partial" in path.name]


def test_only_dropping_is_possible_and_nothing_to_do_is_said(images, latents, vae_folder):
    with pytest.raises(ValueError, match=r"latents has every image of images that can be read; there is nothing to"):
        build(images, vae_folder, "grown", add_to=str(latents), drop_gone=True)
    (images / "010.png").unlink()
    with pytest.raises(ValueError, match="nothing to add"):
        build(images, vae_folder, "grown", add_to=str(latents))
    grown = build(images, vae_folder, "grown", add_to=str(latents), drop_gone=True)
    assert len(open_latents(grown)[0]) == 39
    (images / "001.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="nothing to add"):
        build(images, vae_folder, "more", add_to=str(grown), max_left_out=0.1)
    assert not list(images.parent.glob(".*.partial"))


def test_broken_images_are_a_share_of_all_and_tried_again(images, vae_folder, encoded):
    whole = (images / "010.png").read_bytes()
    (images / "010.png").write_bytes(b"broken")
    latents = build(images, vae_folder, max_left_out=0.03)
    save_images(images, range(1, 7, 2))
    grown = build(images, vae_folder, "grown", add_to=str(latents), max_left_out=0.03)
    assert open_latents(grown)[1]["counts"]["left_out"] == 1
    (images / "010.png").write_bytes(whole)
    del encoded[:]
    more = build(images, vae_folder, "more", add_to=str(grown))
    assert encoded == ["010.png"]
    assert open_latents(more)[1]["counts"]["left_out"] == 0


def test_an_image_that_has_changed_is_no_second_row_of_its_id(images, latents, vae_folder):
    save_images(images, range(4, 5), seed=1)
    with pytest.raises(ValueError, match=r"1 image of images have ids of other images there, first 004\.png; rename"):
        build(images, vae_folder, "grown", add_to=str(latents))
    grown = rows_of(build(images, vae_folder, "grown", add_to=str(latents), drop_gone=True))
    assert grown["id"][-1] == "004.png"
    assert len(set(grown["id"])) == len(grown["id"]) == 40
    assert grown["image_sha256"][-1] == sha256(images / "004.png")


class Stopped(Exception):
    pass


@pytest.mark.parametrize("drop_gone", [False, True])
@pytest.mark.parametrize("links", [True, False])
def test_an_addition_that_is_interrupted_gives_the_same_bytes(
    images, latents, vae_folder, monkeypatch, drop_gone, links
):
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no links")))
    save_images(images, range(1, 61, 2))
    (images / "010.png").unlink()
    options = {"add_to": str(latents), "drop_gone": drop_gone}
    whole = build(images, vae_folder, "whole", **options)
    encode, calls = ShardEncoder._encode_batch, []

    def stop(self, *others):
        calls.append(1)
        if len(calls) == 4:
            raise Stopped
        return encode(self, *others)

    monkeypatch.setattr(ShardEncoder, "_encode_batch", stop)
    with pytest.raises(Stopped):
        build(images, vae_folder, "grown", **options)
    partial = images.parent / ".grown.partial"
    assert not (images.parent / "grown").exists()
    # What a kill leaves of a copy, and what a crash of the machine leaves of one that was not synced.
    (partial / ".data-00001-of-00005.arrow.partial").write_bytes(b"half")
    if not links or drop_gone:
        (partial / "data-00000-of-00005.arrow").write_bytes(b"")
    grown = build(images, vae_folder, "grown", **options)
    assert hashes(grown) == hashes(whole)
    assert len(calls) == 4 + 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": True}, "flip was False and is True"),
        ({"crop": "none"}, "crop was center and is none"),
        ({"resolution": "20"}, "resolution was 16x16 and is 20x20"),
        ({"vae": "avatar", "resolution": "16"}, r"vae was vae \(\w+\) and is avatar \(\w+\)"),
        ({"anonymous_ids": True}, "has the images' paths as ids: leave out --anonymous_ids"),
        ({"output_dir": "latents"}, "is the cache of --add_to: name a new folder"),
        ({"part": "1/2"}, "part and add_to"),
        ({"add_to": None, "drop_gone": True}, "drop_gone needs add_to"),
        ({"add_to": "images"}, "images is not a latent cache"),
    ],
)
def test_other_settings_are_one_line_that_names_them(
    images, latents, vae_folder, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(images.parent)
    save_images(images, range(1, 3, 2))
    given = {"vae": vae_folder, "resolution": "16", "output_dir": "grown", "add_to": "latents", **options}
    arguments = [f"--{name}={value}" for name, value in given.items() if value is not None]
    assert main(["prepare-latents", "images", *arguments]) == 1
    assert len((error := capsys.readouterr().err).splitlines()) == 1
    assert re.search(message, error), error
    assert not Path("grown").exists()
    assert not Path(".grown.partial").exists()


def test_parts_of_the_source_s_own_validation_are_refused(images, vae_folder):
    latents = build(images, vae_folder)
    for split in ("train", "val"):
        save_images(images.parent / "others" / split, range(100, 104) if split == "train" else range(104, 108))
    with pytest.raises(ValueError, match=r"holds out 2 % .* others has validation images of its own; --split train"):
        build(images.parent / "others", vae_folder, "grown", add_to=str(latents))
    grown = build(images.parent / "others", vae_folder, "grown", add_to=str(latents), split="train")
    assert len(open_latents(grown)[0]) == 44


def test_a_cache_with_splits_of_its_source_holds_nothing_out(tmp_path, vae_folder):
    for split, numbers in (("train", range(40)), ("val", range(40, 44))):
        save_images(tmp_path / "images" / split, numbers)
    latents = build(tmp_path / "images", vae_folder)
    more = save_images(tmp_path / "more", range(300, 400))
    grown = build(more, vae_folder, "grown", add_to=str(latents))
    last = build(save_images(tmp_path / "others", range(400, 500)), vae_folder, "last", add_to=str(grown))
    assert open_latents(last)[1]["counts"] == {"train": 240, "validation": 4, "test": 0, "left_out": 0}
    assert any(is_held_out(name) for name in rows_of(last)["id"])
    (tmp_path / "images/val/040.png").rename(tmp_path / "images/train/040.png")
    with pytest.raises(ValueError, match=r"split of 1 image that it has is another one now, first of val/040\.png"):
        build(tmp_path / "images", vae_folder, "new", add_to=str(latents))


def save_classes(folder: Path, **classes: range) -> Path:
    for name, numbers in classes.items():
        save_images(folder / name, numbers)
    return folder


def test_new_classes_come_after_those_of_the_cache(tmp_path, vae_folder, capsys):
    source = save_classes(tmp_path / "pets", cat=range(20), owl=range(20, 40))
    latents = build(source, vae_folder)
    save_classes(source, bee=range(40, 44), cat=range(44, 48))
    grown = build(source, vae_folder, "grown", add_to=str(latents))
    assert "  added       class: new classes bee, after those of the cache\n" in capsys.readouterr().out
    cache, info = open_latents(grown, hashes=True)
    names = info["condition_labels"]["class"]
    assert names == cache.features["class"].names == ["cat", "owl", "bee"]
    assert info["conditions"] == {"class": 3}
    assert cache["class"][:40] == load_from_disk(str(latents))["class"][:]
    assert [names[number] for number in cache["class"]] == [name.partition("/")[0] for name in cache["id"]]
    # Every file names all classes, so that `load_dataset` reads them from any of them.
    by_card = load_dataset(str(_without_state(grown)), split="train", cache_dir=f"{grown}-cache")
    assert by_card.features["class"].names == names
    assert by_card["class"] == cache["class"][:]
    ids = LatentReader(grown).condition_ids(np.arange(48))[:, 0]
    assert ids.tolist() == cache["class"][:]
    before, after = (open_shards(shard_files(folder)) for folder in (latents, grown))
    assert after.slice(0, 40).equals(before)


def test_fewer_classes_are_those_of_the_cache_by_name(tmp_path, vae_folder):
    latents = build(save_classes(tmp_path / "pets", ant=range(20), cat=range(20, 40)), vae_folder)
    more = save_classes(tmp_path / "more", cat=range(50, 54), dog=range(60, 64))
    cache, info = open_latents(build(more, vae_folder, "grown", add_to=str(latents)))
    assert info["condition_labels"]["class"] == ["ant", "cat", "dog"]
    assert cache["class"][40:] == [1] * 4 + [2] * 4


def test_numbers_that_are_classes_stay_their_own_ids(tmp_path, vae_folder):
    def save(folder: str, numbers: range, values: list[int]) -> Path:
        rows = [f"{i:03}.png,{value}" for i, value in zip(numbers, values, strict=True)]
        save_images(tmp_path / folder, numbers)
        (tmp_path / folder / "metadata.csv").write_text("\n".join(["file_name,kind", *rows]))
        return tmp_path / folder

    latents = build(save("one", range(20), [0, 1, 2, 3] * 5), vae_folder, conditions="kind")
    more = save("two", range(20, 26), [0, 7] * 3)
    cache, info = open_latents(build(more, vae_folder, "grown", conditions="kind", add_to=str(latents)))
    assert cache["kind"][20:] == [0, 7] * 3
    assert info["conditions"] == {"kind": 8}


def test_other_conditions_and_other_labels_of_known_images_are_refused(tmp_path, vae_folder):
    source = save_classes(tmp_path / "pets", cat=range(20), owl=range(20, 40))
    latents = build(source, vae_folder)
    (source / "owl/030.png").rename(source / "cat/030.png")
    with pytest.raises(ValueError, match=r"class of 1 image that it has is another one now, first of owl/030\.png; m"):
        build(source, vae_folder, "grown", add_to=str(latents))
    with pytest.raises(ValueError, match=r"conditions were class and are none \(--conditions chooses\)"):
        build(source, vae_folder, "grown", add_to=str(latents), conditions="none")
    flat = save_images(tmp_path / "flat", range(50, 54))
    rows = "".join(f"{i:03}.png,{i % 2}\n" for i in range(50, 54))
    (flat / "metadata.csv").write_text(f"file_name,class\n{rows}")
    with pytest.raises(ValueError, match="condition class was classes and is yes or no"):
        build(flat, vae_folder, "grown", add_to=str(latents))


def test_anonymous_ids_stay_anonymous(images, vae_folder):
    latents = build(images, vae_folder, anonymous_ids=True)
    save_images(images, range(1, 3, 2))
    with pytest.raises(ValueError, match="has anonymous ids: add --anonymous_ids"):
        build(images, vae_folder, "grown", add_to=str(latents))
    grown = rows_of(build(images, vae_folder, "grown", add_to=str(latents), anonymous_ids=True))
    assert grown["id"] == [digest[:20] for digest in grown["image_sha256"]]


def test_a_cache_of_version_0_1_0_cannot_grow(images, vae_folder):
    kept = Path(__file__).parents[1] / "golden" / "kept-0.1.0" / "latents"
    with pytest.raises(ValueError, match="a cache of format 2 has no hashes of its images; make it again"):
        build(images, vae_folder, "grown", flip=True, add_to=str(kept))


def test_a_dry_run_tells_what_is_new_and_writes_nothing(images, latents, vae_folder, capsys):
    save_images(images, range(1, 3, 2))
    before = sorted(images.parent.iterdir())
    build(images, vae_folder, "grown", add_to=str(latents), dry_run=True)
    assert "added       1 of 41 images, to the 40 of latents" in capsys.readouterr().out
    assert sorted(images.parent.iterdir()) == before
