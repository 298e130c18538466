import json

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline, tiny_transformer
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from pipeline_calls import run

from dit_hf import CosineLatentScheduler, LatentDiTEditPipeline, LatentDiTImg2ImgPipeline, LatentDiTPipeline


def test_every_output_type():
    pipeline = tiny_pipeline()
    assert run(pipeline, output_type="pil")[0].size == (16, 16)
    assert run(pipeline, batch_size=2).shape == (2, 16, 16, 3)
    assert run(pipeline, output_type="pt").shape == (1, 3, 16, 16)
    assert run(pipeline, output_type="latent").shape == (1, 4, 8, 8)
    assert pipeline(num_inference_steps=2, return_dict=False)[0][0].size == (16, 16)
    assert pipeline.num_timesteps == 2


def test_the_same_seed_gives_the_same_pixels_and_another_others():
    pipeline = tiny_pipeline()
    assert np.array_equal(run(pipeline), run(pipeline))
    assert not np.array_equal(run(pipeline), run(pipeline, seed=1))


def test_with_a_generator_an_image_the_batch_does_not_matter():
    pipeline = tiny_pipeline()
    together = run(pipeline, batch_size=2, generator=[torch.Generator().manual_seed(s) for s in (4, 5)])
    alone = [run(pipeline, seed=s)[0] for s in (4, 5)]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)


def test_images_that_are_not_finite_are_refused():
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite: does the VAE need more than float32"):
        run(pipeline)


def test_a_damaged_transformer_is_not_called_an_overflow_of_the_vae():
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="latents are not finite: the transformer's weights are damaged"):
        run(pipeline)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents_mean": [float("nan")] * 4}, "latents_mean must be finite"),
        ({"latents_std": [0.0] * 4}, "latents_std finite numbers above 0"),
        ({"latents_std": [float("inf")] * 4}, "latents_std finite numbers above 0"),
        ({"condition_labels": ["cat"]}, "expected condition_labels to be a dict"),
        ({"condition_labels": {"class": 5}}, r"expected condition_labels\['class'\] to be a list of names, got 5"),
        ({"condition_labels": {"class": [1, 2, 3]}}, "to be a list of names"),
        ({"condition_labels": {"class": ["cat"] * 4}}, "has 4 names for 'class', which has 3 values"),
    ],
)
def test_a_config_that_fits_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(**options)


def test_latents_are_denormalised_for_the_vae():
    pipeline = tiny_pipeline(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.5, 1.0, 2.0, 3.0])
    latents = torch.randn(1, 4, 8, 8)
    stored = latents * torch.tensor([0.5, 1, 2, 3]).view(1, 4, 1, 1) + torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1)
    expected = (pipeline.vae.decode(stored).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pipeline.decode_latents(latents, "pt"), expected)


def test_without_statistics_the_vaes_scaling_is_used():
    pipeline = tiny_pipeline()
    assert pipeline.config.latents_std == pytest.approx([1 / 0.18215] * 4)
    assert pipeline.config.latents_mean == [0.0] * 4


def test_latents_of_another_size_than_trained():
    latents = torch.randn(1, 4, 8, 12)
    assert run(tiny_pipeline(), latents=latents).shape == (1, 16, 24, 3)


def test_callback_sees_each_step_and_may_change_the_latents():
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, float(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    out = run(tiny_pipeline(), callback_on_step_end=callback, output_type="latent")
    assert [step for step, _ in seen] == [0, 1, 2]
    assert seen[0][1] == 499
    assert out.abs().max() == 0


def test_eta_adds_the_noise_of_the_generators():
    pipeline, latents = tiny_pipeline(), torch.randn(1, 4, 8, 8)
    first, again, other = (run(pipeline, latents=latents, eta=1.0, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(*(run(pipeline, latents=latents, seed=seed) for seed in (1, 2)))


def test_unconditional_model():
    pipeline = LatentDiTPipeline(tiny_transformer(), CosineLatentScheduler(), None)
    pipeline.set_progress_bar_config(disable=True)
    assert run(pipeline, output_type="latent", batch_size=2).shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="unconditional"):
        run(pipeline, {"Smiling": True}, output_type="latent")


def test_saved_index_has_no_path_and_round_trips(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "a")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "a")
    assert isinstance(loaded, LatentDiTPipeline)
    loaded.save_pretrained(tmp_path / "b")
    first, second = ((tmp_path / name / "model_index.json").read_text() for name in "ab")
    assert first == second
    assert str(tmp_path) not in first
    assert json.loads(first)["transformer"] == ["diffusers", "LatentDiTTransformer2DModel"]


def test_vae_can_be_given_at_loading(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    assert DiffusionPipeline.from_pretrained(tmp_path, vae=None).vae is None


def test_parts_can_be_set_after_loading(tmp_path):
    expected = run(tiny_pipeline(), {"class": "cat"})
    tiny_pipeline().save_pretrained(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, transformer=None)
    with pytest.raises(ValueError, match=r"no transformer: set pipe\.transformer"):
        run(pipeline)
    pipeline.transformer = tiny_pipeline().transformer
    pipeline.set_progress_bar_config(disable=True)
    assert np.array_equal(run(pipeline, {"class": "cat"}), expected)


def test_a_scheduler_of_another_training_is_refused():
    pipeline = tiny_pipeline()
    own = pipeline.scheduler.config
    for scheduler in (DPMSolverMultistepScheduler(), CosineLatentScheduler(prediction_type="epsilon")):
        pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match=r"create it by from_config\(pipe\.scheduler\.config\)"):
            run(pipeline)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(own)
    run(pipeline)


@pytest.mark.parametrize("settings", [{}, {"use_karras_sigmas": True}])
@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_stock_schedulers_begin_at_the_first_step(kind, settings):
    """With Karras sigmas timesteps repeat, so that a step cannot be looked up by its timestep."""
    pipeline = tiny_pipeline()
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **settings)
    assert np.isfinite(run(pipeline, num_inference_steps=25)).all()
    assert pipeline.scheduler.begin_index == 0


@pytest.mark.parametrize("scheduler", [CosineLatentScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_half_precision_generates_the_same_images(scheduler):
    """Only the model has half precision, not latents and steps: errors do not add up over many steps."""
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = tiny_pipeline().to(dtype)
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
        options = {"num_inference_steps": 50, "output_type": "latent", "guidance_scale": 3.0}
        outputs.append(run(pipeline, {"Smiling": True, "class": "owl"}, **options))
        assert outputs[-1].dtype == torch.float32
    difference = (outputs[1] - outputs[0]).square().mean().sqrt() / outputs[0].std()
    assert 0 < difference < 0.02


def test_many_latents_are_decoded_in_small_batches():
    pipeline, sizes = tiny_pipeline(), []
    pipeline.vae.decoder.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    latents = torch.randn(6, 4, 256, 256)  # as many pixels at once as 16 images of 256 px have
    decoded = pipeline.decode_latents(latents, "pt")
    assert decoded.shape == (6, 3, 512, 512)
    assert sizes == [4, 2]
    torch.testing.assert_close(decoded[5:], pipeline.decode_latents(latents[5:], "pt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"expected \[1, 4"),
        ({"output_type": "jpg"}, "expected output_type pil"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
        ({"batch_size": 2, "generator": [torch.Generator()]}, "1 generators for 2"),
    ],
)
def test_invalid_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()(**{"num_inference_steps": 1, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": 3}, r"expected generator=torch\.Generator\(\)\.manual_seed\(0\) or a list of them, got 3"),
        ({"height": 64}, "LatentDiTPipeline has no argument 'height'; those of guidance are attribute_weights, "),
    ],
)
def test_arguments_of_other_pipelines_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        tiny_pipeline()(num_inference_steps=1, **options)


def test_other_pipelines_save_the_base_layout(tmp_path):
    pipeline = tiny_pipeline()
    for kind in (LatentDiTImg2ImgPipeline, LatentDiTEditPipeline):
        kind.from_pipe(pipeline).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "LatentDiTPipeline"
        assert type(DiffusionPipeline.from_pretrained(tmp_path)) is LatentDiTPipeline
        assert type(kind.from_pretrained(tmp_path)) is kind
