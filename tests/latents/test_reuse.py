"""A cache is reused if its images and labels are the same, by content."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, load_from_disk
from PIL import Image as PILImage

from dit_hf.latents import reuse, shards
from dit_hf.latents.cache import open_latents, push_latents
from dit_hf.latents.encode import ShardEncoder
from dit_hf.latents.prepare import prepare_latents
from dit_hf.storage import sha256

KEPT = Path(__file__).parents[1] / "golden" / "kept-0.1.0"


def save_images(folder: Path, names: list[str], seed: int = 0) -> Path:
    """Save random images of 16 px, all of one size in bytes."""
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PILImage.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    return save_images(tmp_path / "images", [f"{i:02}.bmp" for i in range(20)])


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "MIN_SHARD", 8)
    monkeypatch.setattr(shards, "MAX_BATCH", 4)


def build(source: Path, vae_folder: Path, name: str = "latents", **options) -> Path:
    return prepare_latents(str(source), str(source.parent / name), str(vae_folder), "16", **options)


def modified(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("data-*.arrow")}


def test_the_hash_of_each_file_is_recorded(images, vae_folder):
    cache = load_from_disk(str(build(images, vae_folder)))
    assert {row["id"]: row["image_sha256"] for row in cache} == {p.name: sha256(p) for p in images.iterdir()}


def test_images_edited_in_place_are_noticed(images, vae_folder):
    build(images, vae_folder)
    save_images(images, ["03.bmp", "04.bmp"], seed=1)
    with pytest.raises(FileExistsError, match=r"holds a cache of other images: 2 of 20 .*, first 03\.bmp; name a new"):
        build(images, vae_folder)


def test_a_copied_folder_is_hashed_once_and_is_the_same(images, vae_folder, capsys):
    latents = build(images, vae_folder)
    copied = images.parent / "copied"
    shutil.copytree(images, copied, copy_function=shutil.copyfile)  # other inodes and times
    before, recorded = modified(latents), reuse.read_source_files(latents)[0]
    build(copied, vae_folder)
    assert "already holds" in capsys.readouterr().out
    assert modified(latents) == before
    now = reuse.read_source_files(latents)[0]
    assert (now[:, 2] != recorded[:, 2]).all()
    assert now[0].tolist() == [(s := (copied / "00.bmp").stat()).st_size, s.st_mtime_ns, s.st_ino]


def test_a_cache_without_record_of_the_files_is_compared_by_hashes(images, vae_folder, capsys):
    latents = build(images, vae_folder)
    (latents / reuse.SOURCE_FILES).unlink()  # as after a download
    build(images, vae_folder)
    assert "already holds" in capsys.readouterr().out
    save_images(images, ["19.bmp"], seed=1)
    with pytest.raises(FileExistsError, match=r"1 of 20 images have changed, first 19\.bmp"):
        build(images, vae_folder)


def test_images_inside_shards_are_compared(tmp_path, vae_folder, capsys):
    source = tmp_path / "shards"
    source.mkdir()

    def write(changed: int | None) -> None:
        folder = save_images(tmp_path / "files", [f"{i}.bmp" for i in range(6)])
        if changed is not None:
            save_images(folder, [f"{changed}.bmp"], seed=1)
        data = [{"bytes": (folder / f"{i}.bmp").read_bytes(), "path": None} for i in range(6)]
        Dataset.from_dict({"image": data}, Features({"image": Image()})).to_parquet(source / "a.parquet")

    write(None)
    build(source, vae_folder)
    write(None)
    build(source, vae_folder)
    assert "already holds" in capsys.readouterr().out
    write(4)
    with pytest.raises(FileExistsError, match="1 of 6 images have changed"):
        build(source, vae_folder)


def write_labels(folder: Path, *columns: tuple[str, list]) -> None:
    names = sorted(path.name for path in folder.glob("*.bmp"))
    with open(folder / "metadata.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["file_name", *(name for name, _ in columns)])
        out.writerows(zip(names, *(values for _, values in columns), strict=True))


@pytest.mark.parametrize(
    ("animals", "smiling"), [(["cat", "puppy"], [0, 1]), (["dog", "cat"], [0, 1]), (["cat", "dog"], [1, 0])]
)
def test_changed_labels_are_noticed(images, vae_folder, animals, smiling):
    """Also a class that is renamed without a change of the ids."""
    write_labels(images, ("animal", ["cat", "dog"] * 10), ("smiling", [0, 1] * 10))
    build(images, vae_folder)
    write_labels(images, ("animal", animals * 10), ("smiling", smiling * 10))
    changed = "smiling" if smiling == [1, 0] else "animal"
    with pytest.raises(FileExistsError, match=rf"other settings: labels \({changed}: values or names"):
        build(images, vae_folder)


def test_a_changed_split_is_noticed(images, vae_folder):
    write_labels(images, ("split", ["train"] * 15 + ["test"] * 5))
    build(images, vae_folder)
    write_labels(images, ("split", ["train"] * 14 + ["test"] * 6))
    with pytest.raises(FileExistsError, match=r"labels \(split"):
        build(images, vae_folder)


def test_a_repaired_image_is_added_and_only_its_shard_is_encoded_again(images, vae_folder, small_shards, capsys):
    whole = (images / "09.bmp").read_bytes()
    (images / "09.bmp").write_bytes(b"broken")
    latents = build(images, vae_folder, max_left_out=0.1)
    assert len(load_from_disk(str(latents))) == 19
    before = modified(latents)
    build(images, vae_folder, max_left_out=0.1)
    assert modified(latents) == before  # it was tried again, and left out again
    (images / "09.bmp").write_bytes(whole)
    build(images, vae_folder, max_left_out=0.1)
    cache, info = open_latents(latents)
    assert cache["id"][:] == [f"{i:02}.bmp" for i in range(20)]
    assert info["counts"]["left_out"] == 0
    assert {name for name, time in modified(latents).items() if time != before[name]} == {"data-00001-of-00003.arrow"}
    fresh = build(images, vae_folder, "fresh")
    assert {p.name: sha256(p) for p in latents.iterdir() if p.is_file() and p.suffix == ".arrow"} == {
        p.name: sha256(p) for p in fresh.iterdir() if p.is_file() and p.suffix == ".arrow"
    }
    assert info["statistics"] == open_latents(fresh)[1]["statistics"]


class Stopped(Exception):
    pass


@pytest.fixture
def interrupted(images, vae_folder, small_shards, monkeypatch) -> Path:
    """The images of a build that was stopped after its first shard, which left out one image of eight."""
    whole = (images / "02.bmp").read_bytes()
    (images / "02.bmp").write_bytes(b"broken")

    def stop(count: int, counted: list[int]) -> None:
        counted.append(count)
        if len(counted) == 3:
            raise Stopped

    with monkeypatch.context() as patched:
        encode = ShardEncoder.encode_shards

        def stop_early(self, numbers):
            counted: list[int] = []
            self.on_batch = lambda count: stop(count, counted)
            return encode(self, numbers)

        patched.setattr(ShardEncoder, "encode_shards", stop_early)
        with pytest.raises(Stopped):
            build(images, vae_folder, max_left_out=0.2)
    (images.parent / "02.bmp").write_bytes(whole)
    return images


def test_an_unfinished_cache_is_compared_too(interrupted, vae_folder):
    save_images(interrupted, ["05.bmp"], seed=1)
    with pytest.raises(FileExistsError, match=r"unfinished cache of other images: 1 of 20 .* first 05\.bmp"):
        build(interrupted, vae_folder, max_left_out=0.2)


def test_a_resumed_build_tries_images_again_and_takes_changes_of_what_is_to_come(interrupted, vae_folder, capsys):
    shutil.move(interrupted.parent / "02.bmp", interrupted / "02.bmp")
    save_images(interrupted, ["15.bmp"], seed=1)  # of a shard that is not encoded yet
    latents = build(interrupted, vae_folder)
    cache = load_from_disk(str(latents))
    assert len(cache) == 20
    assert cache[15]["image_sha256"] == sha256(interrupted / "15.bmp")


def test_a_resumed_build_may_have_another_batch_size(interrupted, vae_folder, capsys):
    latents = build(interrupted, vae_folder, max_left_out=0.2, batch_size=3)
    assert "resuming after 8 of 20 images" in capsys.readouterr().out
    fresh = build(interrupted, vae_folder, "fresh", max_left_out=0.2)
    for name, values in open_latents(fresh)[1]["statistics"].items():
        assert open_latents(latents)[1]["statistics"][name] == pytest.approx(values, rel=1e-4)
    assert load_from_disk(str(latents))["id"][:] == load_from_disk(str(fresh))["id"][:]


def test_a_cache_of_version_0_1_0_is_recognised_by_its_old_rule(tmp_path, capsys):
    shutil.copytree(KEPT / "latents", tmp_path / "latents")
    options = {"num_images": 16, "seed": 787, "flip": True}
    prepare_latents("avatars", str(tmp_path / "latents"), str(KEPT / "latents" / "vae"), "16", **options)
    out = capsys.readouterr().out
    assert "format 2, which did not record the content of its images" in out
    assert "already holds 13 training" in out
    options["num_images"] = 17
    with pytest.raises(FileExistsError, match=r"avatars, 16 images .* and is avatars, 17 images"):
        prepare_latents("avatars", str(tmp_path / "latents"), str(KEPT / "latents" / "vae"), "16", **options)


def test_an_unfinished_cache_of_version_0_1_0_is_finished_in_its_format(tmp_path, capsys):
    identity = json.loads((KEPT / "latents" / "latents.json").read_text())["identity"]
    (tmp_path / ".latents.partial" / "building").mkdir(parents=True)
    shutil.copytree(KEPT / "latents" / "vae", tmp_path / ".latents.partial" / "vae")
    (tmp_path / ".latents.partial" / "building" / "identity.json").write_text(json.dumps(identity))
    options = {"num_images": 16, "seed": 787, "flip": True}
    latents = prepare_latents("avatars", str(tmp_path / "latents"), str(KEPT / "latents" / "vae"), "16", **options)
    cache, info = open_latents(latents)
    earlier, earlier_info = open_latents(KEPT / "latents")
    assert info["identity"] == earlier_info["identity"]
    assert cache.features == earlier.features
    np.testing.assert_allclose(cache["latent_mean"], earlier["latent_mean"], atol=2e-3)


def test_records_of_the_files_are_not_uploaded(images, vae_folder, monkeypatch, hub):
    latents = build(images, vae_folder)
    push_latents(latents, "you/faces")
    names = hub.repositories["datasets/you/faces"].keys()
    assert "latents.json" in names
    assert reuse.SOURCE_FILES not in names
    assert "left_out.csv" not in names  # paths alone
    assert reuse.SOURCE_FILES not in json.loads((latents / "latents.json").read_text())["files"]
