import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import tiny_pipeline, tiny_transformer
from PIL import Image
from series import pixels, save_faces

from dit_hf import LatentDiTPipeline
from dit_hf.sampling.generate import generate_images
from dit_hf.sampling.sample import sample


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return save_faces(tmp_path_factory.mktemp("images"))


def test_images_with_their_settings(model, tmp_path):
    rows = [{"Smiling": True}, {"class": "owl"}]
    options = {"num_images": 5, "attributes": rows, "num_inference_steps": 2, "seed": 3, "batch_size": 2}
    folder = sample(model, str(tmp_path / "out"), **options, options={"guidance_rescale": 0.5})
    expected = generate_images(tiny_pipeline(), range(4, 5), rows, 3, num_inference_steps=2, guidance_rescale=0.5)
    assert np.abs(pixels(folder)[4] - expected[0]).max() <= 1
    text = Image.open(folder / "00003.png").text["dit_hf"]
    metadata = json.loads(text)
    assert metadata["attributes"] == {"class": "owl"}
    assert (metadata["image_number"], metadata["seed"], metadata["num_inference_steps"]) == (3, 3, 2)
    assert metadata["model"] == "faces"
    assert str(tmp_path) not in text + (folder / "settings.json").read_text()
    assert model not in text
    assert {path.name for path in folder.iterdir()} == {
        *(f"{i:05}.png" for i in range(5)),
        "sheet.png",
        "settings.json",
    }


def test_from_given_images(model, faces, tmp_path):
    own = np.stack([np.asarray(Image.open(faces / f"face-{i}.png")) for i in range(2)])
    options = {"image": str(faces), "num_inference_steps": 4}
    left_half = Image.new("L", (16, 16))
    left_half.paste(255, (0, 0, 8, 16))
    left_half.save(tmp_path / "mask.png")
    masked = {"mode": "inpaint", "mask_image": str(tmp_path / "mask.png"), "num_images": 4}
    inpainted = sample(model, str(tmp_path / "inpaint"), **masked, **options)
    assert np.array_equal(pixels(inpainted)[:, :, 8:], own[[0, 1, 0, 1]][:, :, 8:])
    assert not np.array_equal(pixels(inpainted)[0], pixels(inpainted)[2])
    near = pixels(sample(model, str(tmp_path / "near"), mode="img2img", strength=0.25, **options))
    far = pixels(sample(model, str(tmp_path / "far"), mode="img2img", strength=1.0, **options))
    reconstructed = pixels(sample(model, str(tmp_path / "reconstructed"), mode="img2img", strength=0.0, **options))
    assert len(near) == 2
    assert np.abs(near - reconstructed).mean() < np.abs(far - reconstructed).mean()
    # Of a sampled series the images are read, not the image grid beside them.
    again = sample(model, str(tmp_path / "again"), mode="img2img", image=str(inpainted), num_inference_steps=2)
    assert len(pixels(again)) == 4
    options = {"image": str(faces), "mode": "edit", "attributes": {"Smiling": False}, "edit": {"Smiling": True}}
    edited = sample(model, str(tmp_path / "edit"), edit_strength=0.0, **options)
    assert np.abs(pixels(edited) - reconstructed).mean() < 4
    assert json.loads(Image.open(edited / "00001.png").text["dit_hf"])["image"] == "face-1.png"


def test_the_images_do_not_depend_on_the_batch_size(model, tmp_path):
    """Also where only some images request what is weighted, and with a negative row for each image."""
    rows = [{"Smiling": True}, {"class": "dog"}, {}]
    given = {"attribute_weights": {"Smiling": 2.0}, "negative_attributes": [{"class": "cat"}, {"class": "owl"}]}
    options = {"num_images": 3, "attributes": rows, "num_inference_steps": 2, "options": given}
    alone, *others = (pixels(sample(model, str(tmp_path / f"{b}"), batch_size=b, **options)) for b in (1, 2, 3))
    for images in others:
        assert np.abs(images - alone).max() <= 1
    pipeline = tiny_pipeline()
    expected = generate_images(pipeline, [1], rows, 0, num_inference_steps=2, negative_attributes={"class": "owl"})
    assert np.abs(alone[1] - expected[0]).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": {"attribute_weights": {"class": 2.0}}}, "attribute_weights: class is requested for no image"),
        ({"options": {"attribute_weights": ["Smiling"]}}, "expected a dict of numbers"),
        ({"options": {"negative_attributes": {"Hat": True}}}, "'Hat' is unknown"),
        ({"options": {"negative_attributes": 3}}, "expected a dict like"),
        ({"num_inference_steps": 1000}, "must be a whole number between 1 and 500"),
        ({"num_inference_steps": 30, "scheduler": "DDIMScheduler"}, "does not divide 500"),
    ],
)
def test_options_that_would_fail_later_are_refused_before_any_work(model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        sample(model, str(tmp_path / "out"), attributes={"Smiling": True}, **{"num_images": 1, **options})
    assert not (tmp_path / "out").exists()


def test_films_between_noises_and_between_images(model, faces, tmp_path):
    options = {"mode": "interpolate", "num_frames": 4, "num_inference_steps": 2}
    folder = sample(model, str(tmp_path / "noises"), num_images=3, attributes={"class": "cat"}, **options)
    assert len(pixels(folder)) == 7
    with Image.open(folder / "film.gif") as film:
        assert film.n_frames == 12  # forth and back
    ends = generate_images(tiny_pipeline(), [0, 1, 2], [{"class": "cat"}], 0, num_inference_steps=2)
    assert np.abs(pixels(folder)[[0, 3, 6]] - ends).max() <= 1
    options["num_inference_steps"] = 50
    between = pixels(sample(model, str(tmp_path / "images"), image=str(faces), **options))
    reconstructed = sample(model, str(tmp_path / "reconstructed"), mode="img2img", image=str(faces), strength=0.0)
    assert np.abs(between[[0, 3]] - pixels(reconstructed)).mean() < 4


def test_the_grid_shows_each_image_after_the_one_it_was_made_from(model, faces, tmp_path):
    options = {"mode": "img2img", "strength": 0.0, "num_images": 3}

    def cells(folder):
        with Image.open(folder / "sheet.png") as grid:
            # Cells of 96 pixels and a gap of 6, with a line of text below.
            return [np.asarray(grid)[6 : 6 + 96, 6 + i * 102 : 6 + i * 102 + 96] for i in range(grid.width // 102)]

    def enlarged(image):
        return np.asarray(image.resize((96, 96), Image.Resampling.BICUBIC))

    before = [enlarged(Image.open(faces / f"face-{i}.png")) for i in range(2)]
    two = sample(model, str(tmp_path / "two"), image=str(faces), **options)
    after = [enlarged(Image.open(two / f"0000{i}.png")) for i in range(3)]
    expected = [before[0], after[0], before[1], after[1], before[0], after[2]]
    assert all(np.array_equal(*pair) for pair in zip(cells(two), expected, strict=True))
    one = sample(model, str(tmp_path / "one"), image=str(faces / "face-0.png"), **options)
    assert np.array_equal(cells(one)[0], before[0])
    assert len(cells(one)) == 4


def test_autoguidance_by_a_weaker_model(model, tmp_path):
    weak = tiny_pipeline()
    weak.transformer = tiny_transformer(seed=5, num_layers=1, conditions={"Smiling": 2, "class": 3})
    weak.save_pretrained(tmp_path / "weak")
    options = {"num_images": 2, "num_inference_steps": 2, "guidance_scale": 1.5}
    out = sample(model, str(tmp_path / "out"), guidance_model=str(tmp_path / "weak"), **options)
    expected = generate_images(
        tiny_pipeline(),
        range(2),
        None,
        0,
        num_inference_steps=2,
        guidance_scale=1.5,
        guidance_transformer=weak.transformer,
    )
    assert np.abs(pixels(out) - expected).max() <= 1


def test_a_weaker_model_of_other_conditions_is_refused(model, tmp_path):
    weaker = tiny_pipeline()
    LatentDiTPipeline(tiny_transformer(), weaker.scheduler, weaker.vae).save_pretrained(tmp_path / "weaker")
    message = r"--guidance_model has other conditions \(none\) than the model \(\{'Smiling': 2, 'class': 3\}\)"
    with pytest.raises(ValueError, match=message):
        sample(model, str(tmp_path / "out"), guidance_model=str(tmp_path / "weaker"))
    assert not (tmp_path / "out").exists()


def test_attributes_that_are_nested_too_deep_are_refused(model, tmp_path):
    (tmp_path / "deep.json").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(ValueError, match=r"deep\.json: expected JSON such as .*, a JSON file or a latent cache"):
        sample(model, str(tmp_path / "out"), attributes=str(tmp_path / "deep.json"))


def test_a_cpu_s_full_memory_is_one_line(model, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes")

    monkeypatch.setattr("dit_hf.sampling.sample.generate_images", fail)
    with pytest.raises(OSError, match="the memory is full; a --batch_size below 16 needs less"):
        sample(model, str(tmp_path / "out"), num_images=1)


def test_a_stock_scheduler_and_half_precision(model, tmp_path):
    options = {"num_images": 2, "num_inference_steps": 10, "attributes": {"class": "owl"}}
    for scheduler in ("HeunDiscreteScheduler", "UniPCMultistepScheduler"):
        full = pixels(sample(model, str(tmp_path / scheduler), scheduler=scheduler, **options))
        half = sample(model, str(tmp_path / f"{scheduler}-half"), scheduler=scheduler, dtype="bfloat16", **options)
        assert 0 < np.abs(pixels(half) - full).mean() < 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "x.png"}, "--image is for --mode img2img or inpaint or interpolate or edit, not generate"),
        ({"mode": "edit"}, "--mode edit needs --image and --edit"),
        ({"mode": "img2img", "image": "nowhere.png"}, "nowhere.png: no such file or folder"),
        ({"attributes": {"Tall": True}}, "valid names are Smiling, class"),
        ({"attributes": "nowhere.json"}, "nowhere.json: expected JSON"),
        ({"attributes": []}, "expected a dict"),
        ({"scheduler": "Euler"}, "valid names are .*DPMSolverMultistepScheduler"),
        ({"options": {"guidance_rescal": 1}}, "valid names are .*guidance_rescale"),
        ({"options": {"guidance_rescale": "x"}}, "--options guidance_rescale: expected a number, got 'x'"),
        ({"num_images": 0}, "at least 1"),
        ({"num_images": 10**12}, "--num_images 1000000000000 must be at most 10,000,000"),
        ({"mode": "interpolate", "num_frames": 10**11}, "--num_frames 100000000000 must be at most 10,000,000"),
        ({"mode": "interpolate", "num_images": 10**5, "num_frames": 10**5}, "make 9,999,800,002 frames, more than"),
        ({"attributes": {"Smiling": float("inf")}}, "expected Smiling between 0 and 1, got inf"),
        ({"attributes": "[" * 100_000}, r"--attributes \S{200}: expected JSON"),
        ({"options": {"attribute_weights": 5}}, "expected a dict of numbers .*, got attribute_weights=5"),
        ({"options": {"negative_attributes": 5}}, "got negative_attributes=5"),
        ({"seed": -1}, "--seed -1 must be at least 0"),
        ({"mode": "interpolate", "attributes": [{}, {}]}, "one row of attributes"),
        ({"mode": "interpolate", "num_images": 1}, "two noises or images"),
        ({"mode": "interpolate", "eta": 0.5}, "--eta is for --mode"),
        ({"mode": "img2img", "image": "x.png", "strength": 1.5}, "--strength 1.5 must be between 0 and 1"),
    ],
)
def test_invalid_arguments_are_refused(model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        sample(model, str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_ranks_generate_the_images_of_one(model, tmp_path):
    common = ["sample", model, "--num_images", "7", "--batch_size", "2", "--num_inference_steps", "2"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "dit_hf"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for python_args, folder in ((["-m", "dit_hf"], alone), (launch, shared)):
        command = [sys.executable, *python_args, *common, "--output_dir", str(folder)]
        subprocess.run(command, check=True, env=environment)
    assert np.array_equal(pixels(alone), pixels(shared))
