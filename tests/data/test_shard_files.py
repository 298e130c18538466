"""Splits and classes of the shards in a folder."""

import pickle

import fsspec
import pyarrow as pa
import pytest
import yaml
from celeba import save_image, small_image
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from layouts import data_set

from dit_hf.data.contents import SourceOptions
from dit_hf.data.shard_files import with_stored_classes
from dit_hf.data.sources import open_source


def test_a_shard_and_its_folder_that_name_different_splits(tmp_path):
    for name in ("test/train-0.parquet", "train/train-0.parquet"):
        (tmp_path / name).parent.mkdir()
        data_set(2).to_parquet(tmp_path / name)
    with pytest.raises(ValueError, match=r"test/train-0\.parquet is named like the train split and in a folder named"):
        open_source(str(tmp_path))
    assert open_source(str(tmp_path), SourceOptions(split_from="files")).plan.counts == {"train": 4}
    assert open_source(str(tmp_path), SourceOptions(split_from="folders")).plan.counts == {"train": 2, "test": 2}


def test_images_beside_shards_can_be_excluded(tmp_path):
    data_set(4).to_parquet(tmp_path / "train.parquet")
    for i in range(12):
        save_image(tmp_path / "assets" / f"{i}.png")
    with pytest.raises(ValueError, match=r"12 images .* and 1 shards .* or --exclude the others"):
        open_source(str(tmp_path))
    assert len(open_source(str(tmp_path), SourceOptions(exclude=["assets"])).rows) == 4
    # Up to ten are previews.
    previews = open_source(str(tmp_path), SourceOptions(exclude=["assets/1*.png"])).plan.contents.unused
    assert previews["9 images beside the shards"] == "previews (name their folder to read them)"


def test_shards_whose_splits_number_their_classes_each_by_itself(tmp_path):
    for name, names in (("train", ["crow", "owl", "wren"]), ("test", ["owl", "wren"])):
        rows = {"image": [small_image()] * 6, "bird": [i % len(names) for i in range(6)]}
        features = Features({"image": Image(), "bird": ClassLabel(names=names)})
        Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{name}-0.parquet")
    rows = open_source(str(tmp_path)).rows
    names = [rows.features["bird"].names[value] for value in rows["bird"]]
    assert names == ["crow", "owl", "wren"] * 2 + ["owl", "wren"] * 3
    # Within a split they cannot be told apart by the reader of datasets.
    (tmp_path / "test-0.parquet").rename(tmp_path / "train-1.parquet")
    with pytest.raises(ValueError, match=r"train-0\.parquet and train-1\.parquet have different classes"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("place", ["clone", "elsewhere"])
def test_a_repository_whose_splits_number_their_classes_each_by_itself(tmp_path, place):
    (tmp_path / "data").mkdir()
    for split, names in (("train", ["crow", "owl", "wren"]), ("test", ["owl", "wren"])):
        rows = {"image": [small_image()] * 6, "bird": [i % len(names) for i in range(6)]}
        features = Features({"image": Image(), "bird": ClassLabel(names=names)})
        Dataset.from_dict(rows, features).to_parquet(tmp_path / f"data/{split}-0.parquet")
    files = {split: f"data/{split}-0.parquet" for split in ("train", "test")}
    listed = [{"split": split, "path": path} for split, path in files.items()]
    card = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": listed}]})
    (tmp_path / "README.md").write_text(f"---\n{card}---\n")
    if place == "clone":
        rows = open_source(str(tmp_path)).rows
        found = [rows.features["bird"].names[value] for value in rows["bird"]]
    else:  # as the Hub's files are named, by URLs
        loaded = load_dataset("parquet", data_files={split: str(tmp_path / path) for split, path in files.items()})
        assert loaded["test"].features["bird"].names == ["crow", "owl", "wren"]  # what this is about
        urls = {split: [f"memory://{tmp_path / path}"] for split, path in files.items()}
        for split, path in files.items():
            fsspec.filesystem("memory").pipe(urls[split][0], (tmp_path / path).read_bytes())
        parts = with_stored_classes(loaded, urls).values()
        found = [part.features["bird"].names[value] for part in parts for value in part["bird"]]
    assert found == ["crow", "owl", "wren"] * 2 + ["owl", "wren"] * 3


def test_shards_of_other_columns_are_one_line(tmp_path):
    data_set(2).to_parquet(tmp_path / "a.parquet")
    data_set(2).rename_column("Smiling", "Male").to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"its shards differ in their columns \(Male, Smiling\): name one as"):
        open_source(str(tmp_path))


def write_arrow(path, rows, new):
    with pa.OSFile(str(path), "wb") as file, new(file, rows.data.table.schema) as arrow:
        arrow.write_table(rows.data.table)


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file], ids=["stream", "file"])
def test_arrow_shards_of_both_formats(tmp_path, new):
    for number in range(2):
        write_arrow(tmp_path / f"{number}.arrow", data_set(4), new)
    rows = open_source(str(tmp_path)).rows
    assert rows["Smiling"] == [1, 0] * 4
    assert all(row["image"]["bytes"] for row in rows)
    # A process of a build gets the rows by their path.
    assert len(pickle.dumps(rows)) < 20_000
    write_arrow(tmp_path / "2.arrow", data_set(4).rename_column("Smiling", "Male"), new)
    with pytest.raises(ValueError, match=r"its shards differ in their columns \(Male, Smiling\)"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file], ids=["stream", "file"])
def test_classes_of_arrow_shards_elsewhere(tmp_path, new):
    """As the Hub's files are named, by URLs."""
    rows = {}
    for split, names in (("train", ["crow", "owl", "wren"]), ("test", ["owl", "wren"])):
        rows[split] = Dataset.from_dict({"bird": [0, 1]}, Features({"bird": ClassLabel(names=names)}))
        write_arrow(tmp_path / f"{split}.arrow", rows[split], new)
        content = (tmp_path / f"{split}.arrow").read_bytes()
        fsspec.filesystem("memory").pipe(f"memory://{tmp_path}/{split}.arrow", content)
    first = Features({"bird": ClassLabel(names=["crow", "owl", "wren"])})
    loaded = DatasetDict({"train": rows["train"], "test": Dataset.from_dict({"bird": [0, 1]}, first)})
    urls = {split: [f"memory://{tmp_path}/{split}.arrow"] for split in rows}
    assert with_stored_classes(loaded, urls)["test"].features["bird"].names == ["owl", "wren"]
