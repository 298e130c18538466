import errno
import os

import pytest
from celeba import save_image, small_image
from datasets import ClassLabel
from layouts import read

from dit_hf.data.contents import SourceOptions
from dit_hf.data.sources import open_source
from dit_hf.sampling.sample import sample


def test_subfolders_are_classes_and_splits(tmp_path):
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            save_image(tmp_path / split / label / "a.png")
    rows = open_source(str(tmp_path)).rows
    assert rows["id"] == ["train/cat/a.png", "train/dog/a.png", "val/cat/a.png", "val/dog/a.png"]
    assert rows["split"] == ["train", "train", "validation", "validation"]
    assert rows.features["class"] == ClassLabel(names=["cat", "dog"])
    assert rows["class"] == [0, 1, 0, 1]
    # Images beside the folders of classes have no class.
    save_image(tmp_path / "train" / "c.png")
    source = open_source(str(tmp_path))
    assert source.rows["class"] == [None, 0, 1, 0, 1]
    assert source.plan.conditions["class"] == "2 classes: cat 2, dog 2; 1 without a value (folder)"
    # At several depths below, it is not clear which folder is the class.
    save_image(tmp_path / "train" / "dog" / "pug" / "d.png")
    with pytest.raises(ValueError, match="1 and 2 folders deep: --conditions class takes the last folder"):
        open_source(str(tmp_path))
    rows = open_source(str(tmp_path), SourceOptions(conditions=["class"])).rows
    assert rows.features["class"].names == ["cat", "dog", "pug"]
    assert "class" not in open_source(str(tmp_path), SourceOptions(conditions=[])).rows.column_names


def test_subfolders_of_any_names_are_classes_except_those_of_a_thousand_images_each(tmp_path):
    for names in (["2019", "2020"], ["747", "cat"], ["001", "010"], ["00000", "01000"]):
        for name in names:
            for i in range(2):
                save_image(tmp_path / "".join(names) / name / f"{i}.png")
        rows = open_source(str(tmp_path / "".join(names))).rows
        if "00000" in names:
            assert "class" not in rows.column_names
        else:
            assert rows.features["class"] == ClassLabel(names=names)
            assert rows["class"] == [0, 0, 1, 1]


def test_a_cache_inside_its_source_is_skipped(tmp_path):
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "latents" / "reconstructions.png")
    for name in ("latents.json", "data-00000-of-00001.arrow"):
        (tmp_path / "latents" / name).touch()
    assert open_source(str(tmp_path)).rows["id"] == ["a.png"]


def test_links_are_followed_once_and_hidden_files_are_skipped(tmp_path):
    save_image(tmp_path / "real" / "a.png")
    save_image(tmp_path / "source" / ".hidden.png")
    save_image(tmp_path / "source" / "b.png")
    (tmp_path / "source" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "source" / "again").symlink_to(tmp_path / "source")
    assert open_source(str(tmp_path / "source")).rows["id"] == ["b.png", "linked/a.png"]


def test_a_folder_that_may_not_be_read_is_named_and_the_others_are_read(tmp_path, monkeypatch):
    for name in ("a.png", "lost+found/b.png"):
        save_image(tmp_path / name)
    scandir = os.scandir

    def refuse(folder):  # instead of a mode, because root may read everything
        if str(folder).endswith("lost+found"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    source = open_source(str(tmp_path))
    assert source.rows["id"] == ["a.png"]
    assert source.plan.contents.unused == {"folder lost+found/": "Permission denied"}


def test_image_grids_and_films_are_not_images(model, tmp_path):
    options = {"num_inference_steps": 1}
    faces = sample(model, str(tmp_path / "faces"), num_images=3, **options)
    film = sample(model, str(tmp_path / "film"), mode="interpolate", num_images=2, num_frames=4, **options)
    assert (film / "film.gif").is_file()
    assert open_source(str(faces)).rows["id"] == [f"0000{i}.png" for i in range(3)]
    assert open_source(str(film)).rows["id"] == [f"0000{i}.png" for i in range(4)]
    assert "sheet.png: an image grid or film" in "\n".join(open_source(str(faces)).plan.lines())
    packed = sample(model, str(tmp_path / "packed"), num_images=3, output_format="npz", **options)
    with pytest.raises(FileNotFoundError, match="no images in it"):
        open_source(str(packed))


def test_every_format_is_found_by_its_suffix_and_other_files_are_counted(tmp_path):
    for suffix in ("png", "ppm", "pgm", "tga", "jpe", "webp", "tiff", "jp2"):
        small_image().convert("L" if suffix == "pgm" else "RGB").save(tmp_path / f"a.{suffix}")
    (tmp_path / "a.png").rename(tmp_path / "A.PNG")
    (tmp_path / "b.svg").write_text("<svg/>")
    (tmp_path / "nosuffix").write_bytes((tmp_path / "A.PNG").read_bytes())
    source = read(tmp_path)
    assert source.plan.counts == {"train": 8}
    assert "1 .svg, 1 without a suffix" in str(source.plan)
