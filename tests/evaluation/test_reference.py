"""Reference statistics: those of the images, never replaced by others, and with the conditions of their rows."""

import json
import os

import numpy as np
import pytest
from celeba import save_image
from PIL import Image
from safetensors.numpy import load_file, save_file

from dit_hf import open_images
from dit_hf.evaluation import reference_images
from dit_hf.evaluation.features import load_features
from dit_hf.evaluation.metrics import frechet_distance
from dit_hf.evaluation.reference import load_reference, reference
from dit_hf.storage import locked_beside, write_manifest
from dit_hf_cli import main


@pytest.fixture(scope="module")
def statistics(tmp_path_factory, net):
    """Reference statistics of 80 avatars at 16 px."""
    folder = tmp_path_factory.mktemp("reference") / "avatars"
    return reference("avatars", str(folder), net, resolution="16", num_images=80)


def test_statistics_are_those_of_the_images(tmp_path):
    images = open_images("avatars", 16, num_images=30)
    features = load_features("efficientnet-lite0")(np.stack([np.asarray(image) for image in images["image"]]))
    loaded = load_reference(reference("avatars", str(tmp_path / "statistics"), resolution="16", num_images=30))
    np.testing.assert_allclose(loaded.features, features, atol=1e-3)
    np.testing.assert_allclose(loaded.gaussian.mean, features.mean(0), atol=1e-3)
    assert loaded.attributes(["Smiling", "Bald", "Nose"]) == [
        {"Smiling": row["Smiling"], "Bald": row["Bald"]} for row in images.remove_columns("image")
    ]
    assert loaded.info["pictures"]["pictures"] == 30
    assert loaded.info["pictures"]["pixels_sha256"]


def test_other_statistics_are_not_replaced_and_the_same_are_not_computed_again(statistics, net):
    written = (statistics / "reference.json").stat().st_mtime_ns
    reference("avatars", str(statistics), net, resolution="16", num_images=80)
    assert (statistics / "reference.json").stat().st_mtime_ns == written
    with pytest.raises(FileExistsError, match="holds other statistics"):
        reference("avatars", str(statistics), net, resolution="16", num_images=70)


def test_statistics_of_images_that_were_changed_are_not_reused(net, tmp_path, capsys):
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(tmp_path / f"{i}.bmp")
    source, out = tmp_path, tmp_path.parent / f"{tmp_path.name}-statistics"
    reference(str(source), str(out), net, resolution="16")
    reference(str(source), str(out), net, resolution="16")
    size = (source / "0.bmp").stat().st_size
    Image.new("RGB", (16, 16), "white").save(source / "0.bmp")
    assert (source / "0.bmp").stat().st_size == size
    with pytest.raises(FileExistsError, match="before its images were changed; name a new folder"):
        reference(str(source), str(out), net, resolution="16")
    # What version 0.1.0 wrote has no such hash.
    info = json.loads((out / "reference.json").read_text())
    del info["content_sha256"], info["json_sha256"]
    (out / "reference.json").write_text(json.dumps(info))
    capsys.readouterr()
    reference(str(source), str(out), net, resolution="16")
    assert "compared by name and size alone" in capsys.readouterr().out


def test_images_whose_files_have_not_changed_are_not_read_again(net, tmp_path, monkeypatch):
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(tmp_path / f"{i}.bmp")
    source, out = tmp_path, tmp_path.parent / f"{tmp_path.name}-statistics"
    reference(str(source), str(out), net, resolution="16")
    reads = []
    hash_image = reference_images._hash_image
    monkeypatch.setattr(reference_images, "_hash_image", lambda stored: reads.append(stored) or hash_image(stored))
    reference(str(source), str(out), net, resolution="16")
    assert not reads
    os.utime(source / "0.bmp")  # its content is the same, as in a copy
    for expected in (4, 4):
        reference(str(source), str(out), net, resolution="16")
        assert len(reads) == expected
    # Size and time are kept, the inode is not.
    status = (source / "0.bmp").stat()
    Image.new("RGB", (16, 16), "white").save(source / "new.bmp")
    os.utime(source / "new.bmp", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(source / "new.bmp", source / "0.bmp")
    with pytest.raises(FileExistsError, match="before its images were changed"):
        reference(str(source), str(out), net, resolution="16")


def test_what_a_killed_call_left_beside_finished_statistics_is_removed(net, tmp_path):
    out = reference("avatars", str(tmp_path / "out"), net, resolution="16", num_images=40)
    (tmp_path / ".out.features").mkdir()
    reference("avatars", str(out), net, resolution="16", num_images=40)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_other_content_is_not_replaced(net, tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(FileExistsError, match=r"holds something else \(no reference\.json\); name a new folder"):
        reference("avatars", str(tmp_path), net, resolution="16", num_images=40)
    assert (tmp_path / "mine.txt").is_file()


def test_classes_are_matched_by_their_names(cats_and_owls, net, tmp_path):
    loaded = load_reference(reference(str(cats_and_owls), str(tmp_path / "out"), net, resolution="16"))
    assert loaded.attributes(["class"]) == [{"class": i} for i in (0, 0, 1, 1)]
    assert loaded.attributes(["class"], {"class": ["cat", "dog", "owl"]}) == [{"class": i} for i in (0, 0, 2, 2)]
    # Ids stay as they are if a side has no names or mere numbers, or if no name of equally many is shared.
    for labels in ({}, {"class": ["0", "1", "2"]}, {"class": ["a cat", "an owl"]}):
        assert loaded.attributes(["class"], labels) == loaded.attributes(["class"])
    with pytest.raises(ValueError, match="class='owl' is unknown to the model; valid names are cat, dog"):
        loaded.attributes(["class"], {"class": ["cat", "dog"]})


def test_statistics_with_more_images_than_features_are_the_same_distribution(statistics):
    """They are read back by their covariance."""
    loaded = load_reference(statistics)
    assert loaded.features.shape == (80, 16)
    assert frechet_distance(loaded.gaussian, loaded.features) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info, tensors: tensors.pop("features"), "no features, "),
        (lambda info, tensors: tensors.update(mean=tensors["mean"] * np.nan), "mean is not finite"),
        (lambda info, tensors: tensors.update(features=tensors["features"][:, :5]), r"expected mean of shape \[5\]"),
        (lambda info, tensors: tensors.pop("condition.Smiling"), r"expected condition.Smiling of shape \[80\]"),
        (lambda info, tensors: tensors.update(rows=tensors["rows"] / 2), "rows in torch.float64"),
        (lambda info, tensors: info.update(features=[]), "features is no dict"),
        (lambda info, tensors: info.update(condition_labels=[]), "condition_labels is no dict"),
        (lambda info, tensors: info["pictures"].update(resolution=16), "pictures without source or"),
        (lambda info, tensors: info["pictures"].update(pictures=9), "9 images, but 80 features"),
    ],
)
def test_statistics_that_somebody_has_made_up_are_refused(statistics, tmp_path, change, message):
    info = json.loads((statistics / "reference.json").read_text())
    tensors = load_file(statistics / "statistics.safetensors")
    change(info, tensors)
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, tmp_path / "statistics.safetensors"
    )
    for key in ("files", "json_sha256"):
        info.pop(key)
    write_manifest(tmp_path, "reference.json", **info)
    with pytest.raises(ValueError, match=f"{tmp_path} is no statistics of images .*{message}.*; delete"):
        load_reference(tmp_path)


def test_two_calls_do_not_write_one_folder(net, tmp_path, capsys):
    call = ["reference", "avatars", "--num_images", "4", "--resolution", "16", "--features", net]
    with locked_beside(tmp_path / "one"):
        assert main([*call, "--output_dir", str(tmp_path / "one")]) == 1
    assert f"output_dir {tmp_path}/one is being written by another process; wait" in capsys.readouterr().err
    assert not (tmp_path / "one").exists()


def test_a_missing_source_is_one_line(tmp_path, capsys):
    assert main(["reference", "nowhere", "--output_dir", str(tmp_path / "out")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_one_image_has_no_statistics(tmp_path, capsys):
    options = ["--num_images", "1", "--resolution", "16", "--output_dir", str(tmp_path / "out")]
    assert main(["reference", "avatars", *options]) == 1
    assert "source avatars: a covariance needs at least two images, got 1 (--num_images)" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_attributes_without_a_value_are_not_requested(net, tmp_path):
    for i in range(4):
        save_image(tmp_path / "source" / f"{i}.png")
    rows = "0.png,1,0\n1.png,,1\n2.png,0,NA\n3.png,,"
    (tmp_path / "source" / "metadata.csv").write_text(f"file_name,Smiling,Male\n{rows}")
    statistics = load_reference(reference(str(tmp_path / "source"), str(tmp_path / "out"), net, resolution="16"))
    requested = statistics.attributes(["Smiling", "Male"])
    assert requested == [{"Smiling": 1, "Male": 0}, {"Male": 1}, {"Smiling": 0}, {}]
