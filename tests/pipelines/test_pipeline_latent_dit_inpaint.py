import logging

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

from dit_hf import LatentDiTInpaintPipeline
from dit_hf.data.avatars import choose_face, render_face
from dit_hf.sampling.sample import SCHEDULERS


@pytest.fixture
def pipeline():
    pipeline = LatentDiTInpaintPipeline(**tiny_pipeline().components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def face(seed=0, size=16):
    return render_face(choose_face(seed, 0), size)


def half(level=255, size=16):
    """Return a mask whose left half is to be inpainted."""
    mask = Image.new("L", (size, size))
    mask.paste(level, (0, 0, size // 2, size))
    return mask


def run(pipeline, **options):
    options = {"num_inference_steps": 5, "generator": torch.Generator().manual_seed(0), "image": face(), **options}
    return pipeline(**{"mask_image": half(), **options}).images


def arrays(images):
    return np.stack([np.asarray(image) for image in images])


def test_outside_the_mask_every_pixel_is_the_original(pipeline):
    for image in (face(), face(size=48)):
        (inpainted,) = arrays(run(pipeline, image=image))
        own = np.asarray(pipeline.image_processor.resize(image, 16, 16))
        assert np.array_equal(inpainted[:, 8:], own[:, 8:])
        assert not np.array_equal(inpainted[:, :8], own[:, :8])


def test_without_pasting_the_rest_is_the_vaes_reconstruction_in_latents(pipeline):
    latents = run(pipeline, output_type="latent")
    image_latents = pipeline.encode_images(face())
    torch.testing.assert_close(latents[..., 4:], image_latents[..., 4:])
    assert (latents[..., :4] - image_latents[..., :4]).abs().mean() > 0.1
    assert not np.array_equal(arrays(run(pipeline, paste_back=False))[0][:, 8:], np.asarray(face())[:, 8:])


def test_at_every_step_the_rest_is_the_image_at_that_level(pipeline):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    image_latents, seen = pipeline.encode_images(face()), []

    def callback(_pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        return {}

    run(pipeline, callback_on_step_end=callback, output_type="latent", jump_n_sample=1)
    for latents, following in zip(seen, [399, 299, 199, 99, None], strict=True):
        expected = (
            image_latents
            if following is None
            else pipeline.scheduler.add_noise(image_latents, noise, torch.tensor([following]))
        )
        torch.testing.assert_close(latents[..., 4:], expected[..., 4:])


def test_grey_blends_and_black_keeps_all(pipeline):
    own, white = np.asarray(face()).astype(float), arrays(run(pipeline, mask_image=half(255)))[0].astype(float)
    black = arrays(run(pipeline, mask_image=half(0)))[0]
    assert np.array_equal(black, own)
    grey = arrays(run(pipeline, mask_image=half(128)))[0].astype(float)
    changed = [np.abs(image[:, :8] - own[:, :8]).mean() for image in (grey, white)]
    assert 0 < changed[0] < changed[1]
    assert np.array_equal(grey[:, 8:], own[:, 8:])


def test_a_latent_is_inpainted_if_any_of_its_pixels_is(pipeline):
    mask = Image.new("L", (16, 16))
    mask.putpixel((5, 6), 255)
    latents, image_latents = run(pipeline, mask_image=mask, output_type="latent"), pipeline.encode_images(face())
    different = ((latents - image_latents).abs().amax(1)[0] > 1e-4).nonzero().tolist()
    assert different == [[3, 2]]
    inpainted, own = arrays(run(pipeline, mask_image=mask))[0], np.asarray(face())
    assert [tuple(place) for place in np.argwhere((inpainted != own).any(-1))] in ([(6, 5)], [])


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler])
def test_stock_schedulers(pipeline, scheduler):
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **SCHEDULERS[scheduler.__name__])
    for strength in (1.0, 0.5):
        (inpainted,) = arrays(run(pipeline, strength=strength, num_inference_steps=10))
        assert np.array_equal(inpainted[:, 8:], np.asarray(face())[:, 8:])
    with pytest.raises(ValueError, match="needs a CosineLatentScheduler"):
        run(pipeline, jump_n_sample=2)


def test_a_strength_below_the_last_step_runs_it_and_is_reported(pipeline, caplog):
    with caplog.at_level(logging.WARNING, "dit_hf"):
        out, kept = (arrays(run(pipeline, mask_image=half(), strength=s, num_inference_steps=1)) for s in (0.6, 0.0))
    assert "strength=0.6 is less than a step of num_inference_steps=1" in caplog.text
    assert np.abs(out.astype(int) - kept)[:, :, :8].mean() > 2


def test_each_step_is_done_four_times_by_default(pipeline):
    seen = []
    pipeline.transformer.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    run(pipeline)
    assert len(seen) == 20
    seen.clear()
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    run(pipeline)
    assert len(seen) == 5


def test_jumps_repeat_steps_from_the_level_at_which_they_began(pipeline):
    seen, inputs = [], []

    def callback(_pipe, step, timestep, tensors):
        seen.append(float(timestep))
        return {}

    pipeline.transformer.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    out = run(pipeline, jump_length=2, jump_n_sample=2, callback_on_step_end=callback)
    assert seen == [499, 399, 499, 399, 299, 199, 299, 199, 99, 99]
    assert len(inputs) == 10
    assert not torch.equal(inputs[0], inputs[2])
    assert np.array_equal(arrays(out)[0][:, 8:], np.asarray(face())[:, 8:])


def test_noising_again_leads_to_the_right_level(pipeline):
    """From constant latents over any levels in between, the noise has the variance of the last level."""
    pipeline.scheduler.set_timesteps(5)
    schedule, generator = pipeline.scheduler.timesteps, torch.Generator().manual_seed(0)
    latents = torch.full((1, 4, 200, 200), 2.0)
    for level, target in ((5, 3), (3, 2), (2, 0)):
        latents = pipeline._noise_again(latents, schedule, level, target, generator)
        alpha, sigma = pipeline.scheduler.levels(schedule[target])
        assert latents.mean() == pytest.approx(2 * alpha.item(), abs=0.02)
        assert latents.std() == pytest.approx(sigma.item(), abs=0.02)


def test_several_images_masks_and_outputs_for_each(pipeline):
    faces, masks = [face(0), face(1)], [half(), half().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    inpainted = arrays(run(pipeline, image=faces, mask_image=masks, num_images_per_prompt=2))
    for index, outside in enumerate([slice(8, 16), slice(8, 16), slice(0, 8), slice(0, 8)]):
        assert np.array_equal(inpainted[index][:, outside], np.asarray(faces[index // 2])[:, outside])
    assert not np.array_equal(inpainted[0], inpainted[1])
    one = arrays(run(pipeline, attributes=[{"class": i} for i in range(3)]))
    assert len(one) == 3
    assert np.array_equal(one[2][:, 8:], np.asarray(face())[:, 8:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_image": None}, "a mask is needed"),
        ({"image": None}, "an image is needed"),
        ({"mask_image": [half(), half()]}, "2 masks for 1 images"),
        ({"jump_length": 0}, "jump_length=0"),
        ({"jump_n_sample": 2.5}, "jump_n_sample=2.5"),
    ],
)
def test_invalid_arguments_are_refused(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        run(pipeline, **options)
