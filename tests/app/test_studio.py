import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline, tiny_transformer, tiny_vae
from PIL import Image, ImageDraw

from dit_hf import CosineLatentScheduler, LatentDiTPipeline
from dit_hf.app.snippet import python_code
from dit_hf.app.studio import PIPELINES, Settings, Studio, read_image, union
from dit_hf.sampling.generate import generators

QUICK = Settings(num_images=3, seed=5, num_inference_steps=4, guidance_scale=2.0)


def test_noise_in_the_alpha_of_a_canvas_is_no_stroke():
    """Browsers that blur fingerprints add 1 to the alpha of pixels at random."""
    alpha = np.random.default_rng(0).integers(0, 2, (64, 64)).astype(np.uint8)
    alpha[10:20, 10:20] = 255
    layers = [Image.merge("LA", [Image.new("L", (64, 64)), Image.fromarray(a)]) for a in (alpha, alpha // 255 * 255)]
    for size in ((64, 64), (16, 16)):
        noisy, clean = (union([layer], size) for layer in layers)
        assert np.array_equal(noisy, clean)
        assert clean.getbbox() is not None


def results(studio, call):
    """Run a call and return its images."""
    *_, last = studio.run(call)
    assert last.is_last
    return last.images


@pytest.fixture
def studio():
    studio = Studio(tiny_pipeline())
    yield studio
    studio.close()


def random_image(seed=0, size=(16, 16)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def arrays(images):
    return np.stack([np.asarray(image).astype(int) for image in images])


def test_conditions_become_controls_that_can_be_left_open():
    conditions = {"class": 3, "Tall": 2, "Bald": 2, "age": 4, "Smiling": 2}
    transformer = tiny_transformer(conditions=conditions)
    labels = {"class": ["cat", "any", "owl"]}
    pipeline = LatentDiTPipeline(transformer, CosineLatentScheduler(), tiny_vae(), condition_labels=labels)
    controls = {control.name: control for control in Studio(pipeline).controls}
    # CelebA's attributes first and by group, the others in the model's order.
    assert list(controls) == ["Smiling", "Bald", "class", "Tall", "age"]
    assert [control.group for control in controls.values()] == ["Face", "Hair", "Others", "Others", "Others"]
    assert controls["Smiling"].values == [("any", None), ("yes", True), ("no", False)]
    assert controls["class"].values == [("any", None), ("cat", 0), ("any", 1), ("owl", 2)]
    assert controls["age"].values == [("any", None), ("0", 0), ("1", 1), ("2", 2), ("3", 3)]
    for control in controls.values():  # the pipeline understands them all
        ids = [pipeline.encode_attributes({control.name: value})[0] for _, value in control.values]
        assert len({tuple(row.tolist()) for row in ids}) == len(control.values)


def test_images_are_a_function_of_seed_and_number_and_report_their_steps(studio):
    pipeline = studio.pipelines["generate"]
    *before, last = studio.run(studio.generate({"Smiling": True}, QUICK))
    assert [(update.step, update.num_steps) for update in before] == [(0, 0), (1, 4), (2, 4), (3, 4), (4, 4)]
    previews = [update.images for update in before if update.images]
    assert previews
    assert all(len(images) == 3 for images in previews)
    options = {"num_inference_steps": 4, "guidance_scale": 2.0}
    alone = [pipeline({"Smiling": True}, generator=one, **options).images[0] for one in generators(5, range(3))]
    assert np.abs(arrays(last.images) - arrays(alone)).max() <= 1
    assert not np.array_equal(arrays(previews[0]), arrays(alone))
    assert len({image.tobytes() for image in last.images}) == 3
    assert not np.array_equal(arrays(results(studio, studio.generate({}, QUICK))), arrays(last.images))


def test_a_call_that_nobody_waits_for_is_stopped(studio):
    seen = []
    studio.pipelines["generate"].transformer.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    updates = studio.run(studio.generate({}, replace(QUICK, num_inference_steps=400)))
    assert next(updates).step == 0
    assert next(updates).step == 1
    updates.close()
    # The next call waits for its end, and the pipelines' scheduler is free again.
    assert len(results(studio, studio.generate({}, QUICK))) == 3
    assert len(seen) < 100


def test_the_examples_are_generated_once(studio):
    images = studio.examples()
    assert len(images) == 8
    assert studio.examples() is images
    again = results(studio, studio.generate({}, Settings(guidance_scale=2.0)))
    assert np.array_equal(arrays(images), arrays(again))


def test_an_image_is_varied_by_the_strength(studio):
    image = random_image()
    kept = results(studio, studio.vary(image, {}, 0.0, QUICK))
    assert len(kept) == 3
    reconstructed = studio.pipelines["img2img"](image=image, strength=0.0).images[0]
    assert np.abs(arrays(kept) - arrays([reconstructed] * 3)).max() <= 1
    changed = results(studio, studio.vary(image, {"class": 1}, 0.75, QUICK))
    assert len({one.tobytes() for one in changed}) == 3


def test_an_edit_needs_something_to_change_and_repeats_itself(studio):
    image = random_image()
    first, second = (results(studio, studio.edit(image, {"Smiling": True}, 1.0, QUICK)) for _ in range(2))
    assert len(first) == 1
    assert np.array_equal(arrays(first), arrays(second))
    other = results(studio, studio.edit(image, {"Smiling": False}, 1.0, QUICK))
    assert not np.array_equal(arrays(first), arrays(other))
    with pytest.raises(ValueError, match="choose at least one attribute"):
        studio.edit(image, {}, 1.0, QUICK)


def test_only_the_painted_part_changes(studio):
    image = random_image()
    layer = Image.new("RGBA", (16, 16))
    ImageDraw.Draw(layer).rectangle((0, 0, 7, 15), fill=(200, 0, 80, 255))
    mask = union([layer, Image.new("RGBA", (16, 16))], image.size)
    assert np.array_equal(np.asarray(mask)[:, :8], np.full((16, 8), 255))
    assert not np.asarray(mask)[:, 8:].any()
    painted = arrays(results(studio, studio.inpaint(image, mask, {}, QUICK)))
    assert np.abs(painted[:, :, 8:] - arrays([image])[:, :, 8:]).max() <= 1
    assert (painted[:, :, :8] != arrays([image])[:, :, :8]).mean() > 0.5
    with pytest.raises(ValueError, match="paint over"):
        studio.inpaint(image, Image.new("L", (16, 16)), {}, QUICK)


@pytest.mark.parametrize("steps", [1, 2, 7, 25])
def test_inpainting_takes_no_more_steps_than_generating(studio, steps):
    seen = []
    studio.pipelines["inpaint"].transformer.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    mask = Image.new("L", (16, 16), 255)
    results(studio, studio.inpaint(random_image(), mask, {}, replace(QUICK, num_inference_steps=steps)))
    assert 0.8 * steps <= len(seen) <= steps


def test_a_film_goes_from_the_first_to_the_second_image_of_a_seed(studio):
    frames = results(studio, studio.interpolate({"Smiling": True}, 4, QUICK))
    ends = results(studio, studio.generate({"Smiling": True}, QUICK))[:2]
    assert len(frames) == 4
    assert np.abs(arrays([frames[0], frames[-1]]) - arrays(ends)).max() <= 1


def calls(studio):
    """One call of each mode, by its name."""
    image, mask = random_image(), Image.new("L", (16, 16), 255)
    return {
        "generate": studio.generate({"Smiling": False}, QUICK),
        "edit": studio.edit(image, {"class": "owl"}, 1.5, QUICK),
        "img2img": studio.vary(image, {}, 0.5, QUICK),
        "inpaint": studio.inpaint(image, mask, {"Smiling": True}, QUICK),
        "interpolate": studio.interpolate({}, 3, QUICK),
    }


@pytest.mark.parametrize("mode", PIPELINES)
def test_the_python_code_of_a_call_generates_its_images(studio, mode, model, tmp_path, monkeypatch):
    """`model` is the same as that of the studio."""
    call, names = calls(studio)[mode], {}
    monkeypatch.chdir(tmp_path)
    for name, value in call.arguments.items():
        if isinstance(value, Image.Image):
            value.save(f"{name}.png")
    exec(python_code(call, model), names)
    assert np.abs(arrays(names["images"]) - arrays(results(studio, call))).max() <= 1


def test_images_carry_their_settings(studio):
    image = results(studio, calls(studio)["img2img"])[2]
    assert json.loads(image.info["dit_hf"]) == {
        "mode": "img2img",
        "num_inference_steps": 4,
        "guidance_scale": 2.0,
        "strength": 0.5,
        "num_images_per_prompt": 3,
        "seed": 5,
        "image_number": 2,
    }


def test_uploads_are_turned_cropped_and_refused(tmp_path):
    studio = Studio(tiny_pipeline())
    turned = random_image(size=(40, 20))
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    turned.save(tmp_path / "turned.png", exif=exif)
    assert read_image(str(tmp_path / "turned.png")).size == (20, 40)
    assert studio.fit(turned).size == (16, 16)
    (tmp_path / "broken.png").write_bytes((tmp_path / "turned.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    for name in ("broken", "text"):
        with pytest.raises(ValueError, match="this file: "):
            read_image(str(tmp_path / f"{name}.png"))


def test_a_model_without_conditions_or_vae():
    transformer = tiny_transformer()
    studio = Studio(LatentDiTPipeline(transformer, CosineLatentScheduler(), tiny_vae()))
    assert studio.controls == []
    assert len(results(studio, studio.generate({}, QUICK))) == 3
    with pytest.raises(ValueError, match="no vae"):
        Studio(LatentDiTPipeline(transformer, CosineLatentScheduler(), None))


def test_the_pipelines_share_the_weights():
    pipeline = tiny_pipeline()
    studio = Studio(pipeline)
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.zero_()
    for one in studio.pipelines.values():
        assert one.transformer is pipeline.transformer
