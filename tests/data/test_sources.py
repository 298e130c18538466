import csv
import io
import json
import tarfile

import numpy as np
import pytest
from celeba import celeba_image, make_celeba
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from dit_hf import open_images
from dit_hf.data.avatars import ATTRIBUTES
from dit_hf.data.conditions import infer_condition
from dit_hf.data.sources import open_source


def image(color: str = "red") -> PILImage.Image:
    return PILImage.new("RGB", (20, 20), color)


def save(path, color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image(color).save(path)


def write_lists_as_txt(celeba):
    """Replace the lists of Kaggle by those of the original CelebA."""
    for stem in ("list_attr_celeba", "list_eval_partition"):
        with open(celeba.folder / f"{stem}.csv", newline="") as file:
            header, *rows = csv.reader(file)
        lines = [" ".join(row) for row in rows]
        if stem == "list_attr_celeba":
            lines = [str(len(rows)), " ".join(header[1:]), *lines]
        (celeba.folder / f"{stem}.txt").write_text("\n".join(lines) + "\n")
        (celeba.folder / f"{stem}.csv").unlink()


def check_celeba(celeba, source, left_out):
    rows = source.rows
    good = [row for row in rows["id"] if not row.startswith("9000")]
    assert good == list(celeba.attributes)
    for row in rows.remove_columns("image"):
        if row["id"] in good:
            assert {name: row[name] for name in ATTRIBUTES} == celeba.attributes[row["id"]]
            assert row["split"] == celeba.splits[row["id"]]
    assert rows.features["Smiling"] == Value("int8")
    reasons = dict(source.left_out)
    assert set(reasons) == set(left_out)
    for name, reason in left_out.items():
        assert reason in reasons[name]


@pytest.mark.parametrize("lists", ["csv", "txt"])
def test_celeba_as_kaggle_ships_it_and_with_the_original_lists(tmp_path, lists):
    celeba = make_celeba(tmp_path / "celeba", 20)
    if lists == "txt":
        write_lists_as_txt(celeba)
    decoded_later = [f"90000{i}.{'png' if i == 4 else 'jpg'}" for i in range(1, 6)]
    left_out = {k: v.replace(".csv", f".{lists}") for k, v in celeba.left_out.items() if k not in decoded_later}
    check_celeba(celeba, open_source(str(celeba.folder)), left_out)


def test_celeba_flat_with_and_without_lists(tmp_path):
    celeba = make_celeba(tmp_path / "celeba", 20, faults=False)
    flat = tmp_path / "flat"
    (celeba.folder / "img_align_celeba" / "img_align_celeba").rename(flat)
    without = open_source(str(flat))
    assert without.rows.column_names == ["id", "image"]
    assert without.rows["id"] == list(celeba.attributes)
    for path in celeba.folder.glob("*.csv"):
        path.rename(flat / path.name)
    check_celeba(celeba, open_source(str(flat)), {})


def test_celeba_splits(tmp_path):
    celeba = make_celeba(tmp_path, 20, faults=False)
    for split, count in (("train", 16), ("validation", 2), ("test", 2)):
        rows = open_images(str(tmp_path), 32, "celeba-178", split=split)
        assert rows["id"] == [name for name, of in celeba.splits.items() if of == split]
        assert len(rows) == count
    assert len(open_images(str(tmp_path), split="train", num_images=5)) == 5
    with pytest.raises(ValueError, match="valid names are train, validation, test"):
        open_images(str(tmp_path), split="held_out")


def test_celeba_hq_without_its_masks_and_with_the_partition_of_celeba(tmp_path):
    root = tmp_path / "CelebAMask-HQ"
    for i in range(3):
        save(root / "CelebA-HQ-img" / f"{i}.jpg")
        save(root / "CelebAMask-HQ-mask-anno" / "0" / f"0000{i}_hair.png")
    lines = ["3", " Male Smiling", *(f"{i}.jpg  {-1 if i else 1}  1" for i in range(3))]
    (root / "CelebAMask-HQ-attribute-anno.txt").write_text("\n".join(lines))
    (root / "CelebA-HQ-to-CelebA-mapping.txt").write_text(
        "idx     orig_idx     orig_file\n0   7   000008.jpg\n1   3   000004.jpg\n2   8   000009.jpg\n"
    )
    (root / "list_eval_partition.txt").write_text("000004.jpg 2\n000008.jpg 1\n000009.jpg 0\n000010.jpg 0\n")
    source = open_source(str(root))
    assert source.left_out == []
    assert source.rows["id"] == ["0.jpg", "1.jpg", "2.jpg"]
    assert source.rows["split"] == ["validation", "test", "train"]
    assert source.rows["Male"] == [1, 0, 0]


def test_subfolders_are_classes_and_splits(tmp_path):
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            save(tmp_path / split / label / "a.png")
    rows = open_source(str(tmp_path)).rows
    assert rows["id"] == ["train/cat/a.png", "train/dog/a.png", "val/cat/a.png", "val/dog/a.png"]
    assert rows["split"] == ["train", "train", "validation", "validation"]
    assert rows.features["class"] == ClassLabel(names=["cat", "dog"])
    assert rows["class"] == [0, 1, 0, 1]
    save(tmp_path / "train" / "c.png")  # at another depth: subfolders are no classes here
    assert "class" not in open_source(str(tmp_path)).rows.column_names


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata(tmp_path, name):
    for i in range(4):
        save(tmp_path / "images" / f"{i}.png")
    rows = [
        {"file_name": "images/0.png", "smiling": True, "age": "old", "caption": "a red square"},
        {"file_name": "images/1.png", "smiling": False, "age": "young", "caption": "a square that is red"},
        {"file_name": "images/2.png", "smiling": False, "age": "young", "caption": "red, square"},
        {"file_name": "images/2.png", "smiling": True, "age": "young", "caption": "again"},
        {"file_name": "images/9.png", "smiling": True, "age": "old", "caption": "nothing"},
    ]
    if name == "metadata.csv":
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    source = open_source(str(tmp_path))
    assert source.rows["id"] == ["images/0.png", "images/1.png", "images/2.png"]
    assert source.rows["smiling"] == [1, 0, 0]
    assert "caption" not in source.rows.column_names
    assert source.unused == ["age", "caption"]  # two ages of three images are too few to be classes
    left_out = dict(source.left_out)
    assert left_out["images/2.png"].startswith("duplicate row: 4")
    assert left_out["images/3.png"] == f"no row in {name}"
    assert left_out["images/9.png"].startswith("no such picture")
    assert len(left_out) == (3 if name == "metadata.csv" else 4)


def test_columns_that_can_be_conditions():
    assert infer_condition([True, False, None]) == ([1, 0, -1], Value("int8"))
    assert infer_condition(["-1", "1", ""]) == ([0, 1, -1], Value("int8"))
    assert infer_condition([0, 2, 1] * 2)[1] == ClassLabel(num_classes=3)
    assert infer_condition(["b", "a", "b", "a"]) == ([1, 0, 1, 0], ClassLabel(names=["a", "b"]))
    assert infer_condition(["10", "9", "2"] * 2)[0] == [10, 9, 2] * 2
    assert infer_condition(["001", "010", None] * 2) == ([0, 1, -1] * 2, ClassLabel(names=["001", "010"]))
    assert infer_condition([2019, 2021] * 2) == ([0, 1] * 2, ClassLabel(names=["2019", "2021"]))
    assert infer_condition(["0", "1", "x"] * 2) == ([0, 1, 2] * 2, ClassLabel(names=["0", "1", "x"]))
    assert infer_condition(list(range(20))) is None  # running numbers
    assert infer_condition([-1, 2] * 2) is None
    assert infer_condition(["one", "two", "three"]) is None  # free text
    assert infer_condition([0.5, 1.0]) is None
    assert infer_condition([1, 10177]) is None
    assert infer_condition([None, None]) is None


def test_subfolders_of_any_names_are_classes_except_those_of_a_thousand_images_each(tmp_path):
    for names in (["2019", "2020"], ["747", "cat"], ["001", "010"], ["00000", "01000"]):
        for name in names:
            for i in range(2):
                save(tmp_path / "".join(names) / name / f"{i}.png")
        rows = open_source(str(tmp_path / "".join(names))).rows
        if "00000" in names:
            assert "class" not in rows.column_names
        else:
            assert rows.features["class"] == ClassLabel(names=names)
            assert rows["class"] == [0, 0, 1, 1]


def test_folders_are_splits_beside_metadata_too(tmp_path):
    for name in ("train/0.png", "train/1.png", "test/0.png"):
        save(tmp_path / name)
    for folder in ("train", "test"):
        (tmp_path / folder / "metadata.jsonl").write_text('{"file_name": "0.png", "size": 1}\n')
    with open(tmp_path / "train" / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "1.png", "size": 0}\n')
    rows = open_source(str(tmp_path)).rows
    assert dict(zip(rows["id"], rows["split"], strict=True)) == {
        "test/0.png": "test",
        "train/0.png": "train",
        "train/1.png": "train",
    }
    assert rows["size"] == [1, 1, 0]
    assert open_source(str(tmp_path), split="test").rows["id"] == ["test/0.png"]
    # If some rows have a split, rows without one are left out.
    with open(tmp_path / "test" / "metadata.jsonl", "w") as file:
        file.write('{"file_name": "0.png", "size": 1, "split": "val"}\n')
    source = open_source(str(tmp_path))
    assert source.rows["split"] == ["validation"]
    assert dict(source.left_out) == dict.fromkeys(["train/0.png", "train/1.png"], "its row has no split")


def test_a_folder_named_like_the_embedded_dataset_is_distinguished(tmp_path):
    save(tmp_path / "avatars" / "a.png")
    assert open_source(str(tmp_path / "avatars")).name == "avatars (a folder)"


def test_a_cache_inside_its_source_is_skipped(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "latents" / "reconstructions.png")
    for name in ("latents.json", "data-00000-of-00001.arrow"):
        (tmp_path / "latents" / name).touch()
    assert open_source(str(tmp_path)).rows["id"] == ["a.png"]


def data_set(count: int) -> Dataset:
    rows = {"face": [image()] * count, "Smiling": [i % 2 == 0 for i in range(count)], "kind": [0, 1] * (count // 2)}
    kinds = ClassLabel(names=["round", "square"])
    return Dataset.from_dict(rows, Features({"face": Image(), "Smiling": Value("bool"), "kind": kinds}))


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
    save(tmp_path / "shards" / "preview.png")  # as repositories have them
    check_data_set(open_source(str(tmp_path / "shards")).rows)
    (tmp_path / "listed").mkdir()
    data_set(2).to_parquet(tmp_path / "listed" / "features.parquet")
    save(tmp_path / "listed" / "a.png")
    (tmp_path / "listed" / "metadata.csv").write_text("file_name\na.png\n")
    assert open_source(str(tmp_path / "listed")).rows["id"] == ["a.png"]
    one = open_images(str(tmp_path / "shards" / "train-00000-of-00001.parquet"), resolution=8)
    assert np.asarray(one[3]["image"]).shape == (8, 8, 3)
    assert len(one) == 4


def test_webdataset(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for i in range(3):
                png = io.BytesIO()
                image().save(png, "png")
                data = {"png": png.getvalue(), "json": json.dumps({"Male": bool(i), "caption": f"no. {i}"}).encode()}
                for suffix, content in data.items():
                    entry = tarfile.TarInfo(f"{i:04}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    rows = open_images(str(tmp_path), resolution=8)
    assert rows["id"] == [f"shard-{shard}/{i:04}" for shard in range(2) for i in range(3)]
    assert rows["Male"] == [0, 1, 1, 0, 1, 1]
    assert rows[5]["image"].size == (8, 8)


def test_links_are_followed_once_and_hidden_files_are_skipped(tmp_path):
    save(tmp_path / "real" / "a.png")
    save(tmp_path / "source" / ".hidden.png")
    save(tmp_path / "source" / "b.png")
    (tmp_path / "source" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "source" / "again").symlink_to(tmp_path / "source")
    assert open_source(str(tmp_path / "source")).rows["id"] == ["b.png", "linked/a.png"]


def test_the_hash_changes_with_the_source(tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path / "one" / name)
        save(tmp_path / "two" / name)
    first = open_source(str(tmp_path / "one"))
    assert first.sha256 == open_source(str(tmp_path / "two")).sha256
    assert first.name == "one"
    celeba_image(0).save(tmp_path / "two" / "b.png")
    assert first.sha256 != open_source(str(tmp_path / "two")).sha256
    assert first.sha256 != open_source(str(tmp_path / "one"), num_images=1).sha256


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
        (lambda folder: (folder / "metadata.csv").write_text("name\na") and str(folder), "no column file_name"),
        (
            lambda folder: (folder / "metadata.csv").write_text(f'file_name,text\na,"{"x" * 200_000}') and str(folder),
            "metadata.csv cannot be read .*is there a quote that is not closed",
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


def test_a_folder_with_unusable_rows_has_the_hash_that_version_0_1_0_gave_it(tmp_path):
    """The reasons are hashed too: other words for them would make every such cache another one."""
    celeba, own = tmp_path / "faces", tmp_path / "own"
    (celeba / "img_align_celeba").mkdir(parents=True)
    for name in ("000001.jpg", "000002.jpg", "000003.jpg", "000003.png"):
        (celeba / "img_align_celeba" / name).write_bytes(b"x" * len(name))
    rows = "000001.jpg,1,-1\n000002.jpg,-1,2\n000003.jpg,1,1\n000009.jpg,1,1\n000001.jpg,1,1\n"
    (celeba / "list_attr_celeba.csv").write_text(f"image_id,Smiling,Male\n{rows}")
    assert open_source(str(celeba)).sha256 == "5b92e6e682264c0794d0a53d6e5d87d43fd1f6c72eefe11411e637899d49d7c6"
    own.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (own / name).write_bytes(b"x" * 7)
    (own / "d.heic").write_bytes(b"x")
    (own / "metadata.csv").write_text("file_name,smiling\na.jpg,1\nb.jpg,0\nz.jpg,1\nc.jpg,\n")
    assert open_source(str(own)).sha256 == "6309cf22ed3814c48d1cc96790cfdc4217a9b841503530ab9555fda39f624cff"
