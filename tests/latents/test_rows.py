"""Rows of a cache as batches: missing values, many classes, one open table."""

import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from dit_hf.config import Config
from dit_hf.latents.cache import open_latents
from dit_hf.latents.prepare import prepare_latents
from dit_hf.latents.reader import LatentReader
from dit_hf.storage import write_manifest
from dit_hf.training.trainer import train


def write_rows(folder: Path, columns: dict[str, list], features: dict, splits: list[str] | None = None) -> Path:
    """Save a dataset of random images of 16 px with these columns."""
    rng, count = np.random.default_rng(0), len(next(iter(columns.values())))
    images = [PILImage.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(count)]
    columns, features = {"image": images, **columns}, {"image": Image(), **features}
    if splits is not None:
        columns, features = {**columns, "split": splits}, {**features, "split": Value("string")}
    Dataset.from_dict(columns, Features(features)).save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="module")
def many_classes(tmp_path_factory, vae_folder) -> Path:
    """A cache of 12 images with ids of 40,000 classes beyond 16 bits, three of them for validation."""
    folder = tmp_path_factory.mktemp("many")
    features = {"class": ClassLabel(num_classes=40_000), "Smiling": Value("int8")}
    columns = {"class": [500, *range(33_000, 38_500, 500)], "Smiling": [0, 1] * 6}
    source = write_rows(folder / "source", columns, features, ["train"] * 9 + ["validation"] * 3)
    return prepare_latents(str(source), str(folder / "latents"), str(vae_folder), "16")


def test_class_ids_beyond_16_bits(many_classes):
    reader = LatentReader(many_classes)
    assert reader.conditions["class"] == 40_000
    ids = reader.condition_ids(reader.indices)
    assert sorted(ids[:, list(reader.conditions).index("class")]) == [500, *range(33_000, 37_000, 500)]


def test_training_on_40_000_classes(many_classes, config: Config):
    config.data.latents, config.train.max_train_steps = str(many_classes), 2
    config.train.global_batch_size = 4
    run = train(config)
    assert len((run / "training_log.csv").read_text().splitlines()) >= 2


def with_missing(cache: Path, folder: Path) -> Path:
    """Copy a cache with every third value of each condition missing."""
    rows, info = open_latents(cache)
    names = list(info["conditions"])
    features, none = rows.features, dict.fromkeys(names)
    rows = rows.map(lambda row, i: none if i % 3 == 0 else {}, with_indices=True, features=features)
    rows.save_to_disk(str(folder))
    shutil.copytree(cache / "vae", folder / "vae")
    del info["files"]
    write_manifest(folder, "latents.json", **info)
    return folder


@pytest.fixture(scope="module")
def missing(many_classes, tmp_path_factory) -> Path:
    return with_missing(many_classes, tmp_path_factory.mktemp("missing") / "latents")


def test_missing_values_are_the_null_condition(missing, many_classes):
    reader, whole = LatentReader(missing), LatentReader(many_classes)
    ids = reader.condition_ids(reader.indices)
    assert (ids[::3] == [reader.conditions[name] for name in reader.conditions]).all()
    kept = np.arange(len(ids)) % 3 != 0
    assert np.array_equal(ids[kept], whole.condition_ids(whole.indices)[kept])


def test_attributes_leave_missing_values_out(missing):
    rows = LatentReader(missing).attributes(3)
    assert rows[0] == {}
    assert rows[1].keys() == rows[2].keys() == {"class", "Smiling"}
    labels = {"class": [f"{i}" for i in range(40_000)]}
    assert LatentReader(missing, conditions=["class"]).attributes(2, labels) == [{}, {"class": rows[1]["class"]}]


def test_training_with_missing_values(missing, config: Config):
    config.data.latents, config.train.max_train_steps = str(missing), 1
    config.train.global_batch_size = 4
    train(config)


@pytest.mark.parametrize(
    ("num_values", "dtype"), [(2, np.uint8), (255, np.uint8), (256, np.uint16), (65_536, np.uint32)]
)
def test_ids_take_the_smallest_type_that_holds_the_null(many_classes, tmp_path, num_values, dtype):
    rows, info = open_latents(many_classes)
    rows = rows.select_columns(["id", "split", "latent_mean", "latent_std"])
    rows = rows.add_column("value", [num_values - 1] * 11 + [None])
    rows.save_to_disk(str(tmp_path / "latents"))
    del info["files"]
    write_manifest(tmp_path / "latents", "latents.json", **{**info, "conditions": {"value": num_values}})
    reader = LatentReader(tmp_path / "latents", "validation")
    assert reader._condition_ids.dtype == dtype
    assert reader.condition_ids(reader.indices).tolist() == [[num_values - 1], [num_values - 1], [num_values]]


def test_values_that_the_condition_does_not_have_are_refused(many_classes, tmp_path):
    rows, info = open_latents(many_classes)
    rows.save_to_disk(str(tmp_path / "latents"))
    del info["files"]
    write_manifest(tmp_path / "latents", "latents.json", **{**info, "conditions": {"class": 30_000}})
    with pytest.raises(ValueError, match="expected values of class from 0 to 29999, got others"):
        LatentReader(tmp_path / "latents")


def test_a_reader_of_another_split_shares_the_table(many_classes):
    training = LatentReader(many_classes, conditions=["class"])
    validation, alone = training.of_split("validation"), LatentReader(many_classes, "validation", ["class"])
    assert validation._table is training._table
    assert len(validation) == 3
    assert len(training) == 9
    for step in (0, 5):
        for name, values in validation.batch(3, step, 2).items():
            assert np.array_equal(values, alone.batch(3, step, 2)[name])
    with pytest.raises(ValueError, match="no test images"):
        training.of_split("test")
    copy = pickle.loads(pickle.dumps(validation))
    assert np.array_equal(copy.indices, validation.indices)
    assert list(copy.conditions) == ["class"]


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="Linux alone lists the flags of maps")
def test_the_system_is_told_that_reads_are_random(many_classes):
    reader = LatentReader(many_classes)
    path = next(many_classes.glob("data-*.arrow"))
    maps = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    flags = [re.search(r"VmFlags:(.*)", entry)[1].split() for entry in maps if str(path) in entry]
    assert flags
    assert any("rr" in entry for entry in flags)  # MADV_RANDOM
    assert len(reader)
