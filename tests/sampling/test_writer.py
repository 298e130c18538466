"""A series as files: resumed after a kill, never mixed with another one."""

import os
import resource

import numpy as np
import pytest
from conftest import tiny_pipeline
from PIL import Image
from series import pixels

from dit_hf.sampling.generate import generate_images
from dit_hf.sampling.sample import sample


def test_missing_images_are_generated_and_the_others_left(model, tmp_path):
    options = {"num_images": 6, "num_inference_steps": 2, "batch_size": 2}
    folder = sample(model, str(tmp_path / "out"), **options)
    before, times = pixels(folder), {p.name: p.stat().st_mtime_ns for p in folder.glob("0*.png")}
    (folder / "00003.png").unlink()
    sample(model, str(folder), **options)
    assert np.array_equal(pixels(folder), before)
    changed = {p.name for p in folder.glob("0*.png") if p.stat().st_mtime_ns != times[p.name]}
    assert changed == {"00002.png", "00003.png"}
    with pytest.raises(FileExistsError, match="seed was 0 and is 1"):
        sample(model, str(folder), **options, seed=1)
    other = tmp_path / "others" / "faces"  # another model of the same name
    changed = tiny_pipeline()
    changed.transformer.proj_out.weight.data *= 1.01
    changed.save_pretrained(other / "pipeline")
    with pytest.raises(FileExistsError, match="model_sha256 was"):
        sample(str(other), str(folder), **options)
    with pytest.raises(FileExistsError, match="something else"):
        sample(model, str(tmp_path), **options)


@pytest.mark.parametrize("damage", ["half", "empty", "flipped"])
def test_a_damaged_image_is_generated_again(model, tmp_path, damage):
    options = {"num_images": 4, "num_inference_steps": 2, "batch_size": 2}
    folder = sample(model, str(tmp_path / "out"), **options)
    data = (folder / "00003.png").read_bytes()
    flipped = data[:-30] + bytes([data[-30] ^ 4]) + data[-29:]
    (folder / "00003.png").write_bytes({"half": data[: len(data) // 2], "empty": b"", "flipped": flipped}[damage])
    sample(model, str(folder), **options)
    assert (folder / "00003.png").read_bytes() == data


def test_a_damaged_npz_or_settings_are_named_with_the_way_out(model, tmp_path):
    options = {"num_images": 2, "num_inference_steps": 2, "output_format": "npz"}
    folder = sample(model, str(tmp_path / "out"), **options)
    data = (folder / "samples.npz").read_bytes()
    (folder / "samples.npz").write_bytes(data[:400] + bytes([data[400] ^ 4]) + data[401:])
    with pytest.raises(ValueError, match=r"samples\.npz is damaged \(arr_0\.npy\); delete it to generate"):
        sample(model, str(folder), **options)
    (folder / "settings.json").write_text("{}x")
    with pytest.raises(ValueError, match=r"settings\.json is damaged \(.*\); name a new folder"):
        sample(model, str(folder), **options)


def test_a_call_that_was_killed_while_it_wrote_its_settings_blocks_nothing(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".settings.json.partial").write_text("{")
    folder = sample(model, str(tmp_path / "out"), num_images=1, num_inference_steps=1)
    assert sorted(path.name for path in folder.iterdir()) == ["00000.png", "settings.json", "sheet.png"]


def test_a_call_that_failed_before_the_first_image_blocks_nothing(model, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match="guidance_rescale=2"):
        sample(model, out, num_images=1, num_inference_steps=1, options={"guidance_rescale": 2})
    assert len(pixels(sample(model, out, num_images=1, num_inference_steps=1))) == 1


def test_more_frames_than_files_may_be_open(model, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    folder, opened = tmp_path / "film", len(os.listdir("/proc/self/fd"))
    options = {"mode": "interpolate", "num_frames": 60, "num_inference_steps": 1, "batch_size": 64}
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 40, limits[1]))
    try:
        sample(model, str(folder), **options)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with Image.open(folder / "film.gif") as film:
        assert film.n_frames == 118


def test_a_series_resumes_with_the_missing_batches(model, tmp_path, monkeypatch):
    options = {"num_images": 5, "num_inference_steps": 2, "batch_size": 2, "output_format": "npz"}
    whole = np.load(sample(model, str(tmp_path / "whole"), **options) / "samples.npz")["arr_0"]
    batches = []

    def fails_later(pipeline, images, *args, **kwargs):
        batches.append(images.start)
        if images.start == 4 and len(batches) == 3:
            raise OSError("the disk is gone")
        return generate_images(pipeline, images, *args, **kwargs)

    monkeypatch.setattr("dit_hf.sampling.sample.generate_images", fails_later)
    with pytest.raises(OSError, match="the disk is gone"):
        sample(model, str(tmp_path / "cut"), **options)
    again = np.load(sample(model, str(tmp_path / "cut"), **options) / "samples.npz")["arr_0"]
    assert np.array_equal(again, whole)
    assert batches == [0, 2, 4, 4]


def test_one_npz_holds_the_same_images(model, tmp_path):
    options = {"num_images": 5, "num_inference_steps": 2, "batch_size": 2}
    folder = sample(model, str(tmp_path / "png"), **options)
    packed = sample(model, str(tmp_path / "npz"), **options, output_format="npz")
    array = np.load(packed / "samples.npz")["arr_0"]
    assert array.dtype == np.uint8
    assert np.array_equal(array, pixels(folder))
    time = (packed / "samples.npz").stat().st_mtime_ns
    sample(model, str(packed), **options, output_format="npz")
    assert (packed / "samples.npz").stat().st_mtime_ns == time
    assert sorted(path.name for path in packed.iterdir()) == ["samples.npz", "settings.json", "sheet.png"]
