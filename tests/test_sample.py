import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import tiny_pipeline
from PIL import Image

from dit_hf.data.avatars import choose_face, render_face
from dit_hf.sample import sample
from dit_hf.sampling import draw


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "faces"
    tiny_pipeline().save_pretrained(folder / "pipeline")
    return str(folder)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(2):
        render_face(choose_face(0, i), 16).save(folder / f"face-{i}.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    mask.save(folder.parent / "mask.png")
    return folder


def pixels(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]).astype(int)


def test_pictures_with_their_settings(model, tmp_path):
    rows = [{"Smiling": True}, {"class": "owl"}]
    options = {"num_images": 5, "attributes": rows, "num_inference_steps": 2, "seed": 3, "batch_size": 2}
    folder = sample(model, str(tmp_path / "out"), **options, options={"guidance_rescale": 0.5})
    expected = draw(tiny_pipeline(), range(4, 5), rows, 3, num_inference_steps=2, guidance_rescale=0.5)
    assert np.abs(pixels(folder)[4] - expected[0]).max() <= 1
    text = Image.open(folder / "00003.png").text["dit_hf"]
    facts = json.loads(text)
    assert facts["attributes"] == {"class": "owl"}
    assert (facts["image_number"], facts["seed"], facts["num_inference_steps"]) == (3, 3, 2)
    assert facts["model"] == "faces"
    assert str(tmp_path) not in text + (folder / "settings.json").read_text()
    assert model not in text
    assert {path.name for path in folder.iterdir()} == {
        *(f"{i:05}.png" for i in range(5)),
        "sheet.png",
        "settings.json",
    }


def test_what_is_missing_is_drawn_and_what_is_there_is_left(model, tmp_path):
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
    with pytest.raises(FileExistsError, match="something else"):
        sample(model, str(tmp_path), **options)


def test_one_npz_holds_the_same_pictures(model, tmp_path):
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


def test_from_given_pictures(model, faces, tmp_path):
    own = np.stack([np.asarray(Image.open(faces / f"face-{i}.png")) for i in range(2)])
    options = {"image": str(faces), "num_inference_steps": 4}
    mask = str(faces.parent / "mask.png")
    painted = sample(model, str(tmp_path / "inpaint"), mode="inpaint", mask_image=mask, num_images=4, **options)
    assert np.array_equal(pixels(painted)[:, :, 8:], own[[0, 1, 0, 1]][:, :, 8:])
    assert not np.array_equal(pixels(painted)[0], pixels(painted)[2])
    near = pixels(sample(model, str(tmp_path / "near"), mode="img2img", strength=0.25, **options))
    far = pixels(sample(model, str(tmp_path / "far"), mode="img2img", strength=1.0, **options))
    kept = pixels(sample(model, str(tmp_path / "kept"), mode="img2img", strength=0.0, **options))
    assert len(near) == 2
    assert np.abs(near - kept).mean() < np.abs(far - kept).mean()
    options = {"image": str(faces), "mode": "edit", "attributes": {"Smiling": False}, "edit": {"Smiling": True}}
    edited = sample(model, str(tmp_path / "edit"), edit_strength=0.0, **options)
    assert np.abs(pixels(edited) - kept).mean() < 4
    assert json.loads(Image.open(edited / "00001.png").text["dit_hf"])["image"] == "face-1.png"


def test_films_between_noises_and_between_pictures(model, faces, tmp_path):
    options = {"mode": "interpolate", "num_frames": 4, "num_inference_steps": 2}
    folder = sample(model, str(tmp_path / "noises"), num_images=3, attributes={"class": "cat"}, **options)
    assert len(pixels(folder)) == 7
    film = Image.open(folder / "film.gif")
    assert film.n_frames == 12  # there and back
    ends = draw(tiny_pipeline(), [0, 1, 2], [{"class": "cat"}], 0, num_inference_steps=2)
    assert np.abs(pixels(folder)[[0, 3, 6]] - ends).max() <= 1
    options["num_inference_steps"] = 50
    between = pixels(sample(model, str(tmp_path / "pictures"), image=str(faces), **options))
    kept = sample(model, str(tmp_path / "kept"), mode="img2img", image=str(faces), strength=0.0)
    assert np.abs(between[[0, 3]] - pixels(kept)).mean() < 4


def test_rows_of_a_latent_cache_and_of_a_file(model, latents, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text('[{"class": "dog"}]')
    options = {"num_images": 1, "num_inference_steps": 1, "batch_size": 1}
    by_file = sample(model, str(tmp_path / "file"), attributes=str(rows), **options)
    by_value = sample(model, str(tmp_path / "value"), attributes={"class": "dog"}, **options)
    assert np.array_equal(pixels(by_file), pixels(by_value))
    with pytest.raises(ValueError, match="'Male' is unknown; known are Smiling, class"):
        sample(model, str(tmp_path / "cache"), attributes=str(latents), **options)


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
        ({"mode": "img2img", "image": "nowhere.png"}, "nowhere.png: no picture there"),
        ({"attributes": {"Tall": True}}, "known are Smiling, class"),
        ({"attributes": "nowhere.json"}, "nowhere.json: neither JSON"),
        ({"attributes": []}, "expected a dict"),
        ({"scheduler": "Euler"}, "known are .*DPMSolverMultistepScheduler"),
        ({"options": {"guidance_rescal": 1}}, "known are .*guidance_rescale"),
        ({"num_images": 0}, "at least 1"),
        ({"mode": "interpolate", "attributes": [{}, {}]}, "one row of attributes"),
    ],
)
def test_what_does_not_fit_is_refused(model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        sample(model, str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_ranks_draw_what_one_draws(model, tmp_path):
    common = ["sample", model, "--num_images", "7", "--batch_size", "2", "--num_inference_steps", "2"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "dit_hf"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for python_args, folder in ((["-m", "dit_hf"], alone), (launch, shared)):
        command = [sys.executable, *python_args, *common, "--output_dir", str(folder)]
        subprocess.run(command, check=True, env=environment)
    assert np.array_equal(pixels(alone), pixels(shared))
