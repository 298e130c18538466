import base64
import io
import json
import tarfile

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from celeba import save_image, small_image
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from layouts import classes, data_set, read

from dit_hf import open_images
from dit_hf.data.contents import SourceOptions
from dit_hf.data.hf_dataset import read_hf_dataset
from dit_hf.data.sources import open_source
from dit_hf.data.stored_images import parquet_address
from dit_hf.data.stored_paths import drop_foreign_paths, own_folders


def check_data_set(rows):
    assert rows["Smiling"] == [1, 0, 1, 0, 1, 0]
    assert rows.features["kind"].names == ["round", "square"]
    assert rows["split"] == ["train"] * 4 + ["test"] * 2
    assert rows["id"] == ["train-0", "train-1", "train-2", "train-3", "test-0", "test-1"]


def test_parquet_shards_and_saved_datasets(tmp_path):
    (tmp_path / "shards").mkdir()
    data_set(4).to_parquet(tmp_path / "shards" / "train-00000-of-00001.parquet")
    data_set(2).to_parquet(tmp_path / "shards" / "test-00000-of-00001.parquet")
    DatasetDict({"train": data_set(4), "test": data_set(2)}).save_to_disk(tmp_path / "saved")
    for folder in ("shards", "saved"):
        check_data_set(open_source(str(tmp_path / folder)).rows)
    save_image(tmp_path / "shards" / "preview.png")  # as repositories have them
    check_data_set(open_source(str(tmp_path / "shards")).rows)
    (tmp_path / "listed").mkdir()
    data_set(2).to_parquet(tmp_path / "listed" / "features.parquet")
    save_image(tmp_path / "listed" / "a.png")
    (tmp_path / "listed" / "metadata.csv").write_text("file_name\na.png\n")
    assert open_source(str(tmp_path / "listed")).rows["id"] == ["a.png"]
    one = open_images(str(tmp_path / "shards" / "train-00000-of-00001.parquet"), resolution=8)
    assert np.asarray(one[3]["image"]).shape == (8, 8, 3)
    assert len(one) == 4


def test_a_plain_struct_of_bytes_and_path_is_an_image(tmp_path):
    """Written without `datasets`, whose metadata would say so."""
    save_image(tmp_path / "a.png")
    image = {"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table({"image": pa.array([image] * 3), "smiling": [0, 1, 0]}), tmp_path / "shards" / "a.parquet")
    assert len(open_images(str(tmp_path / "shards"), resolution=8)) == 3


def test_a_column_that_a_split_lacks_has_no_values_there(tmp_path):
    parts = {"train": data_set(4).remove_columns("kind"), "test": data_set(2).remove_columns("Smiling")}
    DatasetDict(parts).save_to_disk(tmp_path)
    contents = read_hf_dataset(str(tmp_path), SourceOptions())
    assert len(contents.images) == 6
    assert contents.columns["Smiling"].values.to_pylist() == [True, False, True, False, None, None]
    assert contents.columns["kind"].values.to_pylist() == [None, None, None, None, 0, 1]
    # If it was requested, a split without it is an error, unless that is accepted.
    for conditions in (["Smiling"], ["Smiling", "kind"]):
        with pytest.raises(ValueError, match="--conditions Smiling: no test image has a value"):
            open_source(str(tmp_path), SourceOptions(conditions=conditions))
    assert len(open_source(str(tmp_path), SourceOptions(conditions=["kind"], allow_partial=True)).rows) == 6


def test_webdataset(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for i in range(3):
                png = io.BytesIO()
                small_image().save(png, "png")
                data = {"png": png.getvalue(), "json": json.dumps({"Male": bool(i), "caption": f"no. {i}"}).encode()}
                for suffix, content in data.items():
                    entry = tarfile.TarInfo(f"{i:04}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    rows = open_images(str(tmp_path), resolution=8)
    assert rows["id"] == [f"shard-{shard}/{i:04}" for shard in range(2) for i in range(3)]
    assert rows["Male"] == [0, 1, 1, 0, 1, 1]
    assert rows[5]["image"].size == (8, 8)


def two_configurations(folder):
    for name in ("small", "large"):
        (folder / name).mkdir()
        data_set(2).to_parquet(folder / name / "train.parquet")
    both = [f"- config_name: {name}\n  data_files: {name}/train.parquet\n" for name in ("large", "small")]
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(both)}---\n")
    return str(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: "someone/nothing", "source someone/nothing: no such folder, and as a dataset on the Hub"),
        (lambda folder: (folder / "x.parquet").write_bytes(b"no parquet") and str(folder), "source .*: "),
        (
            lambda folder: Dataset.from_dict({"a": [1]}).to_parquet(folder / "x.parquet") and str(folder),
            "no column of",
        ),
        (
            lambda folder: (folder / "a.zip").write_bytes(b"zip") and str(folder / "a.zip"),
            "or the folder of the images",
        ),
        (two_configurations, "name one by --dataset_config_name: large, small"),
    ],
)
def test_bad_sources_are_one_line_errors(tmp_path, make, message):
    source = make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(9)).decode(), "photo holds images as base64: store the bytes"),
        (
            "faces/a.png",
            r"photo holds paths of images \(first faces/a.png\): put the images in a folder",
        ),
        ("https://example.org/a.jpg?size=2", "photo holds URLs of images"),
    ],
)
def test_a_column_of_text_that_stands_for_images(tmp_path, value, message):
    Dataset.from_dict({"photo": [value] * 2, "label": [0, 1]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path))


def test_a_column_split_with_unknown_names(tmp_path):
    splits = ["train", "train", "val", "unseen"]
    data_set(4).add_column("split", splits).to_parquet(tmp_path / "a.parquet")
    source = open_source(str(tmp_path))
    assert source.plan.counts == {"train": 2, "validation": 1}
    assert source.left_out == [("train-3", "split 'unseen' is unknown")]
    assert open_source(str(tmp_path), SourceOptions(split_from="none")).plan.counts == {"train": 4}


def _images(count):
    return Dataset.from_dict({"image": [small_image()] * count}, Features({"image": Image()}))


def _labelled(names, values):
    return _images(len(values)).add_column("label", values, feature=ClassLabel(names=names))


def test_a_split_in_the_name_of_one_of_several_shards(tmp_path):
    for name in ("part-0", "part-1", "part-2-test"):
        _images(6).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"part-2-test.parquet is named like the test split, .* --split_from none"):
        open_source(str(tmp_path))
    assert read(tmp_path, split_from="files").plan.counts == {"train": 12, "test": 6}
    assert read(tmp_path, split_from="none").plan.counts == {"train": 18}


def test_splits_of_a_saved_dataset_with_further_words_in_their_names(tmp_path):
    DatasetDict(train=_images(8), dev_seen=_images(5), test_unseen=_images(4)).save_to_disk(tmp_path)
    assert read(tmp_path).plan.counts == {"train": 8, "validation": 5, "test": 4}


def test_classes_that_each_split_has_numbered_by_itself_are_joined_by_name(tmp_path):
    train = _labelled(["cat", "dog", "owl"], [0, 1, 2])
    DatasetDict(train=train, test=_labelled(["dog", "owl"], [0, 1, 1])).save_to_disk(tmp_path)
    names = classes(read(tmp_path), "label")
    assert list(names.values()) == ["cat", "dog", "owl", "dog", "owl", "owl"]


@pytest.mark.parametrize("as_struct", [False, True])
def test_encoded_images_in_a_parquet_file_without_the_type_image(tmp_path, as_struct):
    file = io.BytesIO()
    small_image().save(file, "png")
    image = {"bytes": file.getvalue(), "path": None} if as_struct else file.getvalue()
    pq.write_table(pa.table({"image": [image] * 4, "kind": ["cat", "dog", "dog", "cat"]}), tmp_path / "a.parquet")
    images = open_images(str(tmp_path), resolution=20)
    assert [images.features["kind"].int2str(value) for value in images["kind"]] == ["cat", "dog", "dog", "cat"]
    assert np.array_equal(np.asarray(images[3]["image"]), np.asarray(small_image()))


def test_which_of_two_image_columns_is_meant_must_be_said(tmp_path):
    two = {"conditioning": [PIL.Image.new("RGB", (20, 20))] * 2, "target": [small_image()] * 2}
    Dataset.from_dict(two, Features({"conditioning": Image(), "target": Image()})).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="--image_column conditioning or --image_column target"):
        open_source(str(tmp_path))
    images = open_images(str(tmp_path), resolution=20, image_column="target")
    assert np.array_equal(np.asarray(images[0]["image"]), np.asarray(small_image()))


def test_fields_of_one_name_in_two_structs_are_two_conditions(tmp_path):
    eyes = [[{"open": i % 2 == side} for i in range(4)] for side in range(2)]
    _images(4).add_column("left", eyes[0]).add_column("right", eyes[1]).to_parquet(tmp_path / "a.parquet")
    rows = read(tmp_path).rows
    assert rows["left.open"][:] == [1, 0, 1, 0]
    assert rows["right.open"][:] == [0, 1, 0, 1]


def test_paths_in_rows_are_read_only_inside_the_source(tmp_path):
    """A row may name any file of the machine; links and devices count by where they lead."""
    source = tmp_path / "source"
    source.mkdir()
    save_image(tmp_path / "private.png")
    save_image(source / "own.png")
    (source / "link.png").symlink_to(tmp_path / "private.png")
    foreign = [str(tmp_path / "private.png"), "../private.png", str(source / "link.png"), "/dev/zero", str(source)]
    own = [str(source / "own.png"), "own.png"]
    features = Features({"image": Image()})
    stored = {"bytes": (source / "own.png").read_bytes(), "path": "/elsewhere/a.png"}
    rows = [stored, *({"bytes": None, "path": path} for path in own + foreign)]
    pq.write_table(Dataset.from_dict({"image": rows}, features).data.table, source / "a.parquet")
    contents = read_hf_dataset(str(source / "a.parquet"), SourceOptions())
    paths = [image["path"] for image in contents.images["image"]]
    assert (
        paths
        == [parquet_address(str(source / "a.parquet"), "image.bytes", 0)]
        + [str((source / "own.png").resolve())] * 2
        + [None] * 5
    )
    assert contents.unused["paths"] == "5 images are stored as paths outside the source, which are not read"


def test_a_dataset_of_the_hub_names_no_files_of_this_machine(tmp_path):
    save_image(tmp_path / "private.png")
    features = Features({"image": Image(decode=False)})
    images = Dataset.from_dict({"image": [{"bytes": None, "path": str(tmp_path / "private.png")}]}, features)
    checked, dropped = drop_foreign_paths(images, own_folders("owner/name"))
    assert dropped == 1
    assert checked[0]["image"] == {"bytes": None, "path": None}
