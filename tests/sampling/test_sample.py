import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from conftest import tiny_pipeline, tiny_transformer, tiny_vae
from PIL import Image

from dit_hf import CosineLatentScheduler, LatentDiTImg2ImgPipeline, LatentDiTPipeline
from dit_hf.data.avatars import choose_face, render_face
from dit_hf.latents.prepare import prepare_latents
from dit_hf.latents.reader import LatentReader
from dit_hf.sampling.generate import generate_images
from dit_hf.sampling.sample import sample


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "faces"
    tiny_pipeline().save_pretrained(folder / "pipeline")
    return str(folder)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(2):
        render_face(choose_face(0, i), 16).save(folder / f"face-{i}.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    mask.save(folder.parent / "mask.png")
    return folder


def pixels(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]).astype(int)


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
    assert Image.open(folder / "film.gif").n_frames == 118


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


def test_from_given_images(model, faces, tmp_path):
    own = np.stack([np.asarray(Image.open(faces / f"face-{i}.png")) for i in range(2)])
    options = {"image": str(faces), "num_inference_steps": 4}
    mask = str(faces.parent / "mask.png")
    inpainted = sample(model, str(tmp_path / "inpaint"), mode="inpaint", mask_image=mask, num_images=4, **options)
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


def test_films_between_noises_and_between_images(model, faces, tmp_path):
    options = {"mode": "interpolate", "num_frames": 4, "num_inference_steps": 2}
    folder = sample(model, str(tmp_path / "noises"), num_images=3, attributes={"class": "cat"}, **options)
    assert len(pixels(folder)) == 7
    film = Image.open(folder / "film.gif")
    assert film.n_frames == 12  # forth and back
    ends = generate_images(tiny_pipeline(), [0, 1, 2], [{"class": "cat"}], 0, num_inference_steps=2)
    assert np.abs(pixels(folder)[[0, 3, 6]] - ends).max() <= 1
    options["num_inference_steps"] = 50
    between = pixels(sample(model, str(tmp_path / "images"), image=str(faces), **options))
    reconstructed = sample(model, str(tmp_path / "reconstructed"), mode="img2img", image=str(faces), strength=0.0)
    assert np.abs(between[[0, 3]] - pixels(reconstructed)).mean() < 4


def test_images_are_read_as_for_a_latent_cache(model, tmp_path):
    """Transparency is on white, EXIF is applied; hidden files and folders are left out."""
    folder = tmp_path / "images"
    (folder / "folder.png").mkdir(parents=True)
    (folder / "._a.png").write_text("of another system")
    face = render_face(choose_face(0, 0), 16)
    face.putalpha(Image.linear_gradient("L").resize((16, 16)))
    face.save(folder / "a.png")
    white = Image.new("RGBA", (16, 16), "white")
    turned = Image.alpha_composite(white, face).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    turned.transpose(Image.Transpose.ROTATE_90).save(folder / "b.png", exif=exif)
    out = sample(model, str(tmp_path / "out"), mode="img2img", image=str(folder), strength=0.0)
    first, second = pixels(out)
    assert np.abs(first - second).max() <= 1
    plain = LatentDiTImg2ImgPipeline(**tiny_pipeline().components)
    expected = np.asarray(plain(image=turned, strength=0.0).images[0])
    assert np.abs(first - expected).max() <= 1


def test_a_mask_for_each_image_and_several_edits_of_one(model, faces, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for name, box in (("a", (0, 0, 8, 16)), ("b", (8, 0, 16, 16))):
        mask = Image.new("L", (16, 16))
        mask.paste(255, box)
        mask.save(masks / f"{name}.png")
    options = {"mode": "inpaint", "num_inference_steps": 2, "mask_image": str(masks)}
    inpainted = pixels(sample(model, str(tmp_path / "out"), image=str(faces), **options))
    own = [np.asarray(Image.open(faces / f"face-{i}.png")) for i in range(2)]
    assert np.array_equal(inpainted[0][:, 8:], own[0][:, 8:])
    assert np.array_equal(inpainted[1][:, :8], own[1][:, :8])
    # The same mask as a layer of strokes on a transparent background.
    for name in ("a", "b"):
        strokes = Image.open(masks / f"{name}.png")
        layer = Image.new("RGBA", strokes.size, (255, 255, 255, 0))
        layer.putalpha(strokes)
        layer.save(masks / f"{name}.png")
    layered = pixels(sample(model, str(tmp_path / "layered"), image=str(faces), **options))
    assert np.array_equal(layered, inpainted)
    with pytest.raises(ValueError, match="2 masks for 1 images"):
        sample(model, str(tmp_path / "one"), image=str(faces / "face-0.png"), **options)
    edits = [{"class": name} for name in ("cat", "dog", "owl")]
    options = {"mode": "edit", "image": str(faces / "face-0.png"), "edit": edits, "num_inference_steps": 2}
    assert len(pixels(sample(model, str(tmp_path / "edits"), **options))) == 3


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


def test_rows_of_a_latent_cache_and_of_a_file(model, latents, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text('[{"class": "dog"}]')
    options = {"num_images": 1, "num_inference_steps": 1, "batch_size": 1}
    by_file = sample(model, str(tmp_path / "file"), attributes=str(rows), **options)
    by_value = sample(model, str(tmp_path / "value"), attributes={"class": "dog"}, **options)
    assert np.array_equal(pixels(by_file), pixels(by_value))
    with pytest.raises(ValueError, match="has no condition class"):
        sample(model, str(tmp_path / "cache"), attributes=str(latents), **options)
    smiles = LatentDiTPipeline(tiny_transformer(conditions={"Smiling": 2}), CosineLatentScheduler(), tiny_vae())
    smiles.save_pretrained(tmp_path / "smiles")
    options |= {"num_images": 3}
    by_cache = sample(str(tmp_path / "smiles"), str(tmp_path / "cache"), attributes=str(latents), **options)
    reader = LatentReader(latents, conditions=["Smiling"])
    requested = [json.loads(Image.open(by_cache / f"0000{i}.png").text["dit_hf"])["attributes"] for i in range(3)]
    assert requested == reader.attributes(3)
    assert str(latents) not in (by_cache / "settings.json").read_text()


def test_classes_of_a_cache_are_matched_by_name(cats_and_owls, tmp_path, vae_folder):
    """The model has cats, dogs and owls; in the cache owls are the second of two."""
    cache = prepare_latents(str(cats_and_owls), str(tmp_path / "cache"), str(vae_folder), "16")
    reader = LatentReader(cache, conditions=["class"])
    labels = tiny_pipeline().config.condition_labels
    assert {row["class"] for row in reader.attributes(6)} == {0, 1}
    assert {row["class"] for row in reader.attributes(6, labels)} == {0, labels["class"].index("owl")}
    with pytest.raises(ValueError, match="class='owl' is unknown to the model; valid names are cat, dog"):
        reader.attributes(6, {"class": ["cat", "dog"]})


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
        ({"mode": "img2img", "image": "nowhere.png"}, "nowhere.png: no image there"),
        ({"attributes": {"Tall": True}}, "valid names are Smiling, class"),
        ({"attributes": "nowhere.json"}, "nowhere.json: neither JSON"),
        ({"attributes": []}, "expected a dict"),
        ({"scheduler": "Euler"}, "valid names are .*DPMSolverMultistepScheduler"),
        ({"options": {"guidance_rescal": 1}}, "valid names are .*guidance_rescale"),
        ({"options": {"guidance_rescale": "x"}}, "--options guidance_rescale: expected a number, got 'x'"),
        ({"num_images": 0}, "at least 1"),
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
