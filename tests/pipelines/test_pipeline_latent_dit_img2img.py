import logging

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from dit_hf import LatentDiTEditPipeline, LatentDiTImg2ImgPipeline, LatentDiTInpaintPipeline, LatentDiTPipeline
from dit_hf.data.avatars import choose_face, render_face
from dit_hf.sampling.sample import SCHEDULERS

STOCK = [
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
]


@pytest.fixture
def pipeline():
    pipeline = LatentDiTImg2ImgPipeline(**tiny_pipeline(latents_mean=[0.1, 0.2, 0.3, 0.4]).components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def face(seed=0, size=16):
    return render_face(choose_face(seed, 0), size)


def run(pipeline, **options):
    options = {"num_inference_steps": 5, "output_type": "np", "generator": torch.Generator().manual_seed(0), **options}
    return pipeline(**options).images


def reconstruction(pipeline, image):
    """Return an image as the VAE alone reconstructs it."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
    return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def test_strength_0_is_the_vaes_reconstruction(pipeline):
    calls = []
    pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    np.testing.assert_allclose(run(pipeline, image=face(), strength=0.0), reconstruction(pipeline, face()), atol=1e-5)
    assert not calls


def test_strength_1_is_generation_from_noise_alone(pipeline):
    plain = LatentDiTPipeline(**pipeline.components)
    plain.set_progress_bar_config(disable=True)
    expected = run(plain, attributes={"Smiling": True})
    for image in (face(0), face(1)):
        np.testing.assert_allclose(run(pipeline, attributes={"Smiling": True}, image=image, strength=1.0), expected)


def test_strength_is_the_share_of_steps_and_the_level_of_noise(pipeline):
    seen = []

    def callback(_pipe, step, timestep, tensors):
        seen.append(float(timestep))
        return {}

    run(pipeline, image=face(), strength=0.4, num_inference_steps=10, callback_on_step_end=callback)
    assert seen == [199, 149, 99, 49]
    # One step from level 199: by hand.
    options = {"strength": 0.4, "num_inference_steps": 10, "output_type": "latent"}
    first = {}

    def keep(_module, args):
        first.setdefault("noisy", args[0])

    pipeline.transformer.register_forward_pre_hook(keep)
    run(pipeline, image=face(), **options)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipeline.scheduler.add_noise(pipeline.encode_images(face()), noise, torch.tensor([199]))
    torch.testing.assert_close(first["noisy"], expected)


def test_images_are_cropped_resized_encoded_as_the_mean_and_normalised(pipeline):
    wide = Image.new("RGB", (24, 16))
    wide.paste(face(), (4, 0))
    torch.testing.assert_close(pipeline.encode_images(wide), pipeline.encode_images(face()))
    small = face(size=48).resize((16, 16), Image.Resampling.BICUBIC)
    torch.testing.assert_close(pipeline.encode_images(face(size=48)), pipeline.encode_images(small))
    mean = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1)
    pixels = torch.from_numpy(np.array(face())).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        encoded = pipeline.vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(pipeline.encode_images(face()), (encoded - mean) * 0.18215)
    for image in (np.array(face())[None] / 255, torch.from_numpy(np.array(face())).permute(2, 0, 1)[None] / 255):
        torch.testing.assert_close(pipeline.encode_images(image).float(), pipeline.encode_images(face()))
    assert pipeline.encode_images([face().convert("L"), face().convert("RGBA")]).shape == (2, 4, 8, 8)


def test_a_vae_without_a_posterior_encodes_too(pipeline):
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    tiny = LatentDiTImg2ImgPipeline(pipeline.transformer, pipeline.scheduler, vae)
    assert tiny.encode_images(face()).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("scheduler", STOCK)
def test_any_scheduler_begins_at_the_level_of_the_strength(pipeline, scheduler):
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **SCHEDULERS[scheduler.__name__])
    options = {"image": face(), "num_inference_steps": 10}
    first = []
    begins = {"callback_on_step_end": lambda _pipe, step, timestep, _tensors: first.append(timestep + 1) or {}}
    run(pipeline, strength=0.5, **options, **begins)
    assert 0.3 * 500 < first[0] <= 0.5 * 500  # of the levels of noise, also where steps are not evenly spaced
    low, high = (run(pipeline, strength=strength, **options) for strength in (0.1, 0.9))
    expected = reconstruction(pipeline, face())
    assert np.isfinite(high).all()
    assert np.abs(low - expected).mean() < np.abs(high - expected).mean()
    np.testing.assert_allclose(run(pipeline, strength=0.0, **options), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("strength", "steps", "begins"), [(0.6, 1, 1.0), (0.99, 1, 1.0), (0.3, 3, 0.33), (0.49, 2, 0.5), (0.03, 25, 0.04)]
)
def test_a_strength_below_the_last_step_runs_it_and_is_reported(pipeline, caplog, strength, steps, begins):
    options = {"image": face(), "num_inference_steps": steps, "attributes": {"Smiling": True}}
    with caplog.at_level(logging.WARNING, "dit_hf"):
        out = run(pipeline, strength=strength, **options)
    assert pipeline.num_timesteps == 1
    assert f"strength={strength} is less than a step of num_inference_steps={steps}" in caplog.text
    assert f"from a strength of {begins:.2g}" in caplog.text
    assert np.abs(out - reconstruction(pipeline, face())).mean() > 0.01
    caplog.clear()
    run(pipeline, strength=1.0, **options)
    assert not caplog.records


def test_several_images_and_several_outputs_for_each(pipeline):
    faces = [face(0), face(1)]
    images = run(pipeline, image=faces, num_images_per_prompt=2, strength=0.2, attributes=[{"Smiling": True}, {}])
    assert images.shape == (4, 16, 16, 3)
    expected = [reconstruction(pipeline, image)[0] for image in faces for _ in range(2)]
    np.testing.assert_allclose(
        run(pipeline, image=faces, num_images_per_prompt=2, strength=0.0), np.stack(expected), atol=1e-5
    )
    assert len(run(pipeline, image=face(), attributes=[{"class": i} for i in range(3)])) == 3


@pytest.mark.parametrize("kind", [LatentDiTImg2ImgPipeline, LatentDiTInpaintPipeline, LatentDiTEditPipeline])
def test_components_of_a_pipeline_make_another_with_the_same_statistics(kind, tmp_path):
    plain = tiny_pipeline(latents_mean=[0.1, 0.2, 0.3, 0.4])
    made = [kind(**plain.components), kind(**plain.components, **plain.parameters), kind.from_pipe(plain)]
    plain.save_pretrained(tmp_path / "plain")
    made.append(kind.from_pretrained(tmp_path / "plain"))
    for pipeline in made:
        assert type(pipeline) is kind
        assert pipeline.config.latents_mean == [0.1, 0.2, 0.3, 0.4]
        assert pipeline.config.guidance_scale == 2.0
        assert pipeline.config.condition_labels == {"class": ["cat", "dog", "owl"]}
    assert made[0].transformer is plain.transformer
    made[0].save_pretrained(tmp_path / "kind")
    # The base pipeline is saved, which loads without dit_hf too; loading it by the class makes it that kind again.
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "kind")) is LatentDiTPipeline
    assert type(kind.from_pretrained(tmp_path / "kind")) is kind
    assert type(LatentDiTPipeline.from_pipe(made[0])) is LatentDiTPipeline


def test_half_precision(pipeline):
    full = run(pipeline, image=face(), strength=0.5)
    half = run(pipeline.to(torch.bfloat16), image=face(), strength=0.5, generator=torch.Generator().manual_seed(0))
    assert 0 < np.abs(half - full).mean() < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": None}, "an image is needed"),
        ({"image": []}, "an image is needed"),
        ({"strength": 1.2}, "strength=1.2 must be between 0 and 1"),
        ({"image": [face(), face()], "attributes": [{}, {}, {}]}, "3 rows of attributes for 2 images"),
        ({"attributes": {"Tall": True}}, "'Tall' is unknown"),
        ({"image": [face()] * 3, "generator": [torch.Generator()] * 2}, "2 generators for 3 images"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0 must be at least 1"),
    ],
)
def test_invalid_arguments_are_refused(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        run(pipeline, **{"image": face(), **options})
    pipeline.vae = None
    with pytest.raises(ValueError, match="has no vae"):
        run(pipeline, image=face())
