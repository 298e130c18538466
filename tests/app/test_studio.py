import numpy as np
import pytest
import torch
from conftest import tiny_pipeline, tiny_transformer, tiny_vae
from PIL import Image, ImageDraw

from dit_hf import CosineLatentScheduler, LatentDiTPipeline
from dit_hf.app.studio import Settings, Studio, read_image, union
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


def nothing(_step, _total):
    pass


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


def test_images_are_a_function_of_seed_and_number_and_report_their_steps():
    pipeline, steps = tiny_pipeline(), []
    studio = Studio(pipeline)
    images = studio.generate({"Smiling": True}, QUICK, lambda *step: steps.append(step))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    options = {"num_inference_steps": 4, "guidance_scale": 2.0}
    alone = [pipeline({"Smiling": True}, generator=one, **options).images[0] for one in generators(5, range(3))]
    assert np.abs(arrays(images) - arrays(alone)).max() <= 1
    assert len({image.tobytes() for image in images}) == 3
    free = studio.generate({}, QUICK, nothing)
    assert not np.array_equal(arrays(free), arrays(images))


def test_an_image_is_varied_by_the_strength():
    studio, image = Studio(tiny_pipeline()), random_image()
    kept = studio.vary(image, {}, 0.0, QUICK, nothing)
    assert len(kept) == 3
    reconstructed = studio.img2img(image=image, strength=0.0).images[0]
    assert np.abs(arrays(kept) - arrays([reconstructed] * 3)).max() <= 1
    changed = studio.vary(image, {"class": 1}, 0.75, QUICK, nothing)
    assert len({one.tobytes() for one in changed}) == 3


def test_an_edit_needs_something_to_change_and_repeats_itself():
    studio, image = Studio(tiny_pipeline()), random_image()
    first, second = (studio.edit(image, {"Smiling": True}, 1.0, QUICK, nothing) for _ in range(2))
    assert len(first) == 1
    assert np.array_equal(arrays(first), arrays(second))
    assert not np.array_equal(arrays(first), arrays(studio.edit(image, {"Smiling": False}, 1.0, QUICK, nothing)))
    with pytest.raises(ValueError, match="choose at least one attribute"):
        studio.edit(image, {}, 1.0, QUICK, nothing)


def test_only_the_painted_part_changes():
    studio, image = Studio(tiny_pipeline()), random_image()
    layer = Image.new("RGBA", (16, 16))
    ImageDraw.Draw(layer).rectangle((0, 0, 7, 15), fill=(200, 0, 80, 255))
    mask = union([layer, Image.new("RGBA", (16, 16))], image.size)
    assert np.array_equal(np.asarray(mask)[:, :8], np.full((16, 8), 255))
    assert not np.asarray(mask)[:, 8:].any()
    painted = arrays(studio.inpaint(image, mask, {}, QUICK, nothing))
    assert np.abs(painted[:, :, 8:] - arrays([image])[:, :, 8:]).max() <= 1
    assert (painted[:, :, :8] != arrays([image])[:, :, :8]).mean() > 0.5
    with pytest.raises(ValueError, match="paint over"):
        studio.inpaint(image, Image.new("L", (16, 16)), {}, QUICK, nothing)


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
    assert len(studio.generate({}, QUICK, nothing)) == 3
    with pytest.raises(ValueError, match="no vae"):
        Studio(LatentDiTPipeline(transformer, CosineLatentScheduler(), None))


def test_the_four_pipelines_share_the_weights():
    pipeline = tiny_pipeline()
    studio = Studio(pipeline)
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.zero_()
    for one in (studio.text2img, studio.img2img, studio.inpainting, studio.editing):
        assert one.transformer is pipeline.transformer
