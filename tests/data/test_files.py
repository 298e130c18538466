"""What is listed of a folder, and what is not read of it."""

from pathlib import Path

import pytest
from layouts import read, write

from dit_hf.data.contents import parse_exclude

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"


def test_pointers_of_git_lfs_are_named_as_what_they_are(tmp_path):
    (tmp_path / "a.png").write_text(POINTER)
    with pytest.raises(FileNotFoundError, match=r"1 left out, first a\.png: a pointer of git-lfs.*run git lfs pull"):
        read(tmp_path)
    write(tmp_path, "b.png")
    assert read(tmp_path).left_out == [("a.png", "a pointer of git-lfs, not the image: run git lfs pull")]
    for name in ("metadata.csv", "metadata.parquet"):
        (tmp_path / name).write_text(POINTER)
        with pytest.raises(ValueError, match=f"{name} is a pointer of git-lfs, not the file"):
            read(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train.parquet").write_text(POINTER)
    with pytest.raises(ValueError, match=r"train\.parquet is a pointer of git-lfs, not the shard"):
        read(tmp_path / "shards")


def test_patterns_exclude_names_and_paths(tmp_path):
    write(tmp_path, "a/x*2", "b/x*2", "b/y*1", "keep*1")
    assert read(tmp_path, exclude=["b/x", "a"], conditions=[]).rows["id"] == ["b/y/0.png", "keep/0.png"]
    source = read(tmp_path, exclude=["1.*", "keep"], conditions=[])
    assert source.rows["id"] == ["a/x/0.png", "b/x/0.png", "b/y/0.png"]
    assert source.plan.contents.unused["1.* (2 files or folders)"] == "excluded"
    with pytest.raises(ValueError, match=r"--exclude kept: no file or folder of .* is called that"):
        read(tmp_path, exclude=["kept"], conditions=[])


def test_exclude_is_parsed_like_conditions():
    assert parse_exclude(None) is None
    assert parse_exclude("none") == []
    assert parse_exclude("masks/, *_depth.png") == ["masks", "*_depth.png"]
    with pytest.raises(ValueError, match="--exclude a,,b: expected different names"):
        parse_exclude("a,,b")


def test_empty_folders_and_links_are_named(tmp_path):
    write(tmp_path, "train/cat*2", "train/dog*2")
    (tmp_path / "train" / "owl").mkdir()
    (tmp_path / "val").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "cat" / "gone.png").symlink_to("nowhere")
    (tmp_path / "train" / "cat" / "loop.png").symlink_to("loop.png")
    source = read(tmp_path)
    assert source.plan.contents.unused == {
        "folder train/owl/": "empty",
        "folder val/": "a link to a folder that is read already",
    }
    assert source.plan.left_out == {"broken link": 1, "Too many levels of symbolic links": 1}


def test_a_folder_of_archives_says_to_unpack_them(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match=r"no images in it; it holds 1 \.zip: unpack them"):
        read(tmp_path)


def test_one_image_in_two_formats_is_named(tmp_path):
    write(tmp_path, "a.png", "a.jpg", "b.png")
    source = read(tmp_path)
    assert len(source.rows) == 3
    assert source.plan.contents.choices == ["1 image twice by name, read too: a.png beside a.jpg (--exclude '*.png')"]


def test_folders_of_absurd_depth_are_named_and_not_read(tmp_path):
    write(tmp_path, "a*2")
    (tmp_path / Path(*["d"] * 150)).mkdir(parents=True)
    contents = read(tmp_path)
    assert contents.rows["id"] == ["a/0.png", "a/1.png"]
    assert any("more than 100 folders deep" in line for line in contents.plan.lines())
