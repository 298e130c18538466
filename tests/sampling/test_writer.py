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
