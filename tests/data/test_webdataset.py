import io
import json
import tarfile

import pytest
from celeba import small_image
from datasets import Dataset
from layouts import classes, read

from dit_hf.data.stored_images import stored_bytes
from dit_hf.data.webdataset import split_name


def stored(kind="png"):
    file = io.BytesIO()
    small_image().save(file, kind)
    return file.getvalue()


SAMPLE = ((".png", stored()), (".cls", b"1"))


def write_archive(path, files):
    """Write a tar of (name, content), in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def test_a_key_ends_at_the_first_dot_of_the_last_part():
    assert split_name("./a.b/photo v1.0.jpg") == ("a.b/photo v1", "0.jpg")
    assert split_name("000/0001.seg.png") == ("000/0001", "seg.png")
    for name in ("a/._0001.jpg", "__MACOSX/0001.jpg", ".cache/0001.jpg", "a/Thumbs.db"):
        assert split_name(name)[1] is None
    assert split_name("a/README")[1] is None


def test_names_with_dots_that_clash_are_named(tmp_path):
    write_archive(tmp_path / "a.tar", [(f"photo v1.{i}.jpg", stored("jpeg")) for i in range(3)])
    with pytest.raises(ValueError, match=r"the key 'photo v1' has two images, photo v1.0.jpg and photo v1.1.jpg"):
        read(tmp_path)


def test_samples_may_differ_in_the_suffix_of_their_image_and_in_their_values(tmp_path):
    files = []
    for i in range(8):
        image = (f"{i}.jpg", stored("jpeg")) if i < 6 else (f"{i}.png", stored())
        files += [image, (f"{i}.cls", str(i % 2).encode())]
        files += [(f"{i}.txt", b"a caption")] + ([(f"{i}.json", b'{"meta": {"smiling": true}}')] if i else [])
    write_archive(tmp_path / "a.tar", files)
    source = read(tmp_path)
    assert list(classes(source, "cls").values()) == ["0", "1"] * 4
    assert source.rows["smiling"] == [None] + [1] * 7
    assert source.plan.contents.unused == {"files in the archives": "8 .txt"}
    assert [stored_bytes(row["image"]) for row in source.rows] == [stored("jpeg")] * 6 + [stored()] * 2


def test_a_sample_without_an_image_is_named_with_its_key(tmp_path):
    write_archive(tmp_path / "a.tar", [("0.png", stored()), ("0.cls", b"0"), ("1.cls", b"1")])
    plan = read(tmp_path).plan
    assert plan.counts == {"train": 1}
    assert "  left out    1 images or rows: 1 no image (a/1)" in plan.lines()


def test_equal_keys_in_two_splits_stay_apart(tmp_path):
    for split in ("train", "val"):
        write_archive(tmp_path / split / "00000.tar", [(f"{i}.png", stored()) for i in range(2)])
    source = read(tmp_path)
    assert source.rows["id"] == [f"{split}/00000/{i}" for split in ("train", "validation") for i in range(2)]
    assert source.plan.counts == {"train": 2, "validation": 2}


def test_the_tables_that_img2dataset_writes_beside_its_archives_are_not_the_dataset(tmp_path):
    write_archive(tmp_path / "00000.tar", [("0.png", stored()), ("0.json", json.dumps({"url": "u"}).encode())])
    Dataset.from_dict({"url": ["u"], "key": ["0"]}).to_parquet(tmp_path / "00000.parquet")
    source = read(tmp_path)
    assert source.rows["id"] == ["00000/0"]
    assert source.plan.contents.unused["files"] == "1 .parquet"


def test_an_archive_that_changes_is_read_again(tmp_path):
    write_archive(tmp_path / "a.tar", [("0.png", stored())])
    assert len(read(tmp_path).rows) == 1
    write_archive(tmp_path / "a.tar", [("0.png", stored()), ("1.png", stored())])
    assert len(read(tmp_path).rows) == 2


def test_a_broken_archive_is_one_line(tmp_path):
    write_archive(tmp_path / "a.tar", [("0.png", stored())])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"a\.tar") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_folders_in_an_archive_are_splits_and_classes(tmp_path):
    names = [f"pets/{split}/{label}/{i}.png" for split in ("train", "val") for label in ("cat", "dog") for i in (0, 1)]
    write_archive(tmp_path / "a.tar", [*((name, stored()) for name in names), ("pets/notes.md", b"about")])
    source = read(tmp_path)
    assert source.plan.counts == {"train": 4, "validation": 4}
    assert classes(source)["a/pets/val/dog/1"] == "dog"
    assert source.plan.contents.unused == {"files in the archives": "1 .md"}
    assert read(tmp_path, split_from="none").plan.counts == {"train": 8}


def test_an_archive_of_one_split_with_a_folder_of_another(tmp_path):
    write_archive(tmp_path / "train-0.tar", [("val/0.png", stored()), ("train/1.png", stored())])
    with pytest.raises(ValueError, match=r"train-0/val/0 is in a folder of the validation split .* or files chooses"):
        read(tmp_path)
    assert read(tmp_path, split_from="folders").plan.counts == {"train": 1, "validation": 1}
    assert read(tmp_path, split_from="files").plan.counts == {"train": 2}


def test_values_of_samples_count_more_than_folders(tmp_path):
    files = [(f"{label}/{i}{suffix}", content) for label in "ab" for i in (0, 1) for suffix, content in SAMPLE]
    write_archive(tmp_path / "a.tar", files)
    source = read(tmp_path)
    assert list(source.plan.conditions) == ["cls"]
    assert source.plan.contents.unused == {
        "names of folders in the archives": "samples have values (--conditions class reads folders)"
    }
    assert set(classes(read(tmp_path, conditions=["class"])).values()) == {"a", "b"}


def test_images_and_masks_of_one_key(tmp_path):
    contents = {".png": stored(), ".seg.png": stored() + b"mask"}
    files = [(f"{i}{suffix}", content) for i in range(3) for suffix, content in contents.items()]
    write_archive(tmp_path / "a.tar", files)
    with pytest.raises(ValueError, match=r"--image_column png or --image_column seg\.png reads one of them"):
        read(tmp_path)
    for options in ({"image_column": "png"}, {"exclude": ["*.seg.png"]}):
        source = read(tmp_path, **options)
        assert [stored_bytes(row["image"]) for row in source.rows] == [stored()] * 3
    assert stored_bytes(read(tmp_path, image_column="seg.png").rows[0]["image"]) == stored() + b"mask"
    with pytest.raises(ValueError, match=r"--image_column jpg: .* no images of that kind"):
        read(tmp_path, image_column="jpg")


def test_masks_in_other_folders_of_an_archive(tmp_path):
    write_archive(tmp_path / "a.tar", [(f"{kind}/{i}.png", stored()) for kind in ("images", "masks") for i in (0, 1)])
    with pytest.raises(ValueError, match="look like masks"):
        read(tmp_path)
    source = read(tmp_path, exclude=["masks"])
    assert source.rows["id"] == ["a/images/0", "a/images/1"]
    assert source.plan.contents.unused == {"masks (2 files or folders)": "excluded"}


def test_a_list_in_an_archive_is_named(tmp_path):
    write_archive(tmp_path / "a.tar", [("0.png", stored()), ("metadata.csv", b"file_name,hat\n0.png,1\n")])
    source = read(tmp_path)
    assert source.rows["id"] == ["a/0"]
    assert "unpack the archive" in source.plan.contents.unused["metadata.csv in an archive"]
