import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline, tiny_transformer
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from dit_hf import CosineLatentScheduler, LatentDiTPipeline
from dit_hf.pipelines.interpolation import slerp


def run(pipeline, *args, seed=0, **options):
    options = {"num_inference_steps": 3, "output_type": "np", **options}
    options.setdefault("generator", torch.Generator().manual_seed(seed))
    return pipeline(*args, **options).images


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


def test_attributes_in_all_spellings():
    pipeline = tiny_pipeline()
    assert pipeline.encode_attributes(None, 2).tolist() == [[2, 3], [2, 3]]
    rows = [{"Smiling": True, "class": "dog"}, {"class": 2, "Smiling": None}, {"Smiling": False}, {}]
    assert pipeline.encode_attributes(rows).tolist() == [[1, 1], [2, 2], [0, 3], [2, 3]]
    assert len(run(pipeline, rows)) == 4
    assert len(run(pipeline, {"Smiling": True}, batch_size=2, num_images_per_prompt=2)) == 4
    assert not np.array_equal(run(pipeline, {"Smiling": True}), run(pipeline, {"Smiling": False}))


def test_guidance_is_the_formula_and_comes_from_the_config():
    pipeline = tiny_pipeline(guidance_scale=3.0)
    requested = {"Smiling": True, "class": "owl"}
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    out = run(pipeline, requested, latents=latents, num_inference_steps=1, output_type="latent")
    # By hand: one step from the noisiest level to the clean latent of the guided prediction.
    t = torch.tensor([499.0])
    with torch.no_grad():
        free, conditional = (pipeline.transformer(latents, t, ids).sample for ids in (None, torch.tensor([[1, 2]])))
    guided = free + 3.0 * (conditional - free)
    torch.testing.assert_close(out, pipeline.scheduler.predict_original_sample(guided, t, latents))
    assert torch.equal(
        out, run(pipeline, requested, latents=latents, num_inference_steps=1, output_type="latent", guidance_scale=3.0)
    )
    unguided = run(
        pipeline, requested, latents=latents, num_inference_steps=1, output_type="latent", guidance_scale=1.0
    )
    torch.testing.assert_close(unguided, pipeline.scheduler.predict_original_sample(conditional, t, latents))


def predictions(pipeline, latents, *ids):
    """Return the predictions at the noisiest level, one for each row of condition ids."""
    with torch.no_grad():
        return [pipeline.transformer(latents, torch.tensor([499.0]), torch.tensor([row])).sample for row in ids]


def last_step(pipeline, latents, output):
    """Return the end of a single step, from the noisiest level to the clean latent of a prediction."""
    return pipeline.scheduler.predict_original_sample(output, torch.tensor([499.0]), latents)


def one_step(pipeline, *args, **options):
    return run(pipeline, *args, num_inference_steps=1, output_type="latent", **options)


def test_negative_attributes_replace_the_unconditional_prediction():
    pipeline, latents = tiny_pipeline(), torch.randn(1, 4, 8, 8)
    requested, away = predictions(pipeline, latents, [1, 2], [0, 0])
    out = one_step(pipeline, {"Smiling": True, "class": "owl"}, latents=latents, guidance_scale=3.0)
    options = {"latents": latents, "guidance_scale": 3.0, "negative_attributes": {"Smiling": False, "class": "cat"}}
    steered = one_step(pipeline, {"Smiling": True, "class": "owl"}, **options)
    torch.testing.assert_close(steered, last_step(pipeline, latents, away + 3.0 * (requested - away)))
    assert not torch.equal(out, steered)
    # Without attributes too: away from a cat, to anything else.
    free, away = predictions(pipeline, latents, [2, 3], [2, 0])
    out = one_step(pipeline, latents=latents, guidance_scale=3.0, negative_attributes={"class": "cat"})
    torch.testing.assert_close(out, last_step(pipeline, latents, away + 3.0 * (free - away)))


def test_negative_attributes_are_given_for_each_row_of_the_call():
    pipeline, latents = tiny_pipeline(), torch.randn(4, 4, 8, 8)
    rows, away = [{"class": "owl"}, {"class": "cat"}], [{"class": "cat"}, {"class": "dog"}]
    options = {"guidance_scale": 3.0, "latents": latents, "num_images_per_prompt": 2}
    out = one_step(pipeline, rows, negative_attributes=away, **options)
    alone = one_step(pipeline, [rows[1]], negative_attributes=away[1], **{**options, "latents": latents[2:]})
    torch.testing.assert_close(out[2:], alone)


def test_images_that_are_not_finite_are_refused():
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite: does the VAE need more than float32"):
        run(pipeline)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_weights_multiply_the_difference_that_an_attribute_makes(scale):
    pipeline, latents = tiny_pipeline(), torch.randn(1, 4, 8, 8)
    both, only_class, only_smile, free = predictions(pipeline, latents, [1, 2], [2, 2], [1, 3], [2, 3])
    options = {"latents": latents, "guidance_scale": scale, "attribute_weights": {"Smiling": 1.8, "class": 0.4}}
    out = one_step(pipeline, {"Smiling": True, "class": "owl"}, **options)
    weighted = both + 0.8 * (both - only_class) - 0.6 * (both - only_smile)
    torch.testing.assert_close(out, last_step(pipeline, latents, free + scale * (weighted - free)))
    options["attribute_weights"] = {"Smiling": 1.0, "class": 1.0}
    plain = one_step(pipeline, {"Smiling": True, "class": "owl"}, latents=latents, guidance_scale=scale)
    torch.testing.assert_close(one_step(pipeline, {"Smiling": True, "class": "owl"}, **options), plain)


def test_rescaled_guidance_has_the_deviation_of_the_unguided_prediction():
    pipeline, latents = tiny_pipeline(), torch.randn(1, 4, 8, 8)
    requested, free = predictions(pipeline, latents, [1, 2], [2, 3])
    guided = free + 6.0 * (requested - free)
    options = {"latents": latents, "guidance_scale": 6.0}
    for rescale in (1.0, 0.7):
        out = one_step(pipeline, {"Smiling": True, "class": "owl"}, guidance_rescale=rescale, **options)
        expected = rescale * guided * requested.std() / guided.std() + (1 - rescale) * guided
        torch.testing.assert_close(out, last_step(pipeline, latents, expected))


def test_outside_the_interval_of_guidance_there_is_one_prediction():
    pipeline = tiny_pipeline()
    batches = []
    pipeline.transformer.register_forward_pre_hook(lambda _module, args: batches.append(len(args[0])))
    run(pipeline, {"Smiling": True}, num_inference_steps=10, guidance_start=0.2, guidance_end=0.8)
    assert batches == [1, 1, 2, 2, 2, 2, 2, 2, 1, 1]
    without = run(pipeline, {"Smiling": True}, guidance_scale=1.0)
    assert np.array_equal(run(pipeline, {"Smiling": True}, guidance_start=0.5, guidance_end=0.5), without)


def test_autoguidance_steers_away_from_a_weaker_model():
    pipeline, latents = tiny_pipeline(), torch.randn(1, 4, 8, 8)
    weak = tiny_transformer(seed=5, num_layers=1, conditions={"Smiling": 2, "class": 3})
    requested, free = predictions(pipeline, latents, [1, 2], [2, 3])
    with torch.no_grad():
        t = torch.tensor([499.0])
        weak_requested, weak_free = (weak(latents, t, torch.tensor([row])).sample for row in ([1, 2], [2, 3]))
    options = {"latents": latents, "guidance_scale": 1.6, "guidance_transformer": weak}
    out = one_step(pipeline, {"Smiling": True, "class": "owl"}, **options)
    torch.testing.assert_close(out, last_step(pipeline, latents, weak_requested + 1.6 * (requested - weak_requested)))
    out = one_step(pipeline, **options)  # unconditional images too
    torch.testing.assert_close(out, last_step(pipeline, latents, weak_free + 1.6 * (free - weak_free)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_rescale": 1.5}, "guidance_rescale=1.5 must be between 0 and 1"),
        ({"guidance_start": -0.1}, "guidance_start=-0.1"),
        ({"negative_attributes": {"Tall": True}}, "'Tall' is unknown"),
        ({"negative_attributes": [{}, {}]}, "2 rows of negative_attributes for 1 images"),
        ({"attribute_weights": {"class": 2.0}}, "'class', which is requested for no image"),
    ],
)
def test_bad_guidance_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_pipeline(), {"Smiling": True}, **options)


def test_guidance_has_no_effect_on_unconditional_images():
    pipeline = tiny_pipeline()
    assert np.array_equal(run(pipeline, guidance_scale=1.0), run(pipeline, guidance_scale=7.0))
    np.testing.assert_allclose(run(pipeline, {}, guidance_scale=7.0), run(pipeline), atol=1e-5)


def test_interpolation_follows_the_arc_from_noise_to_noise():
    pipeline = tiny_pipeline()
    noises = torch.randn(3, 4, 8, 8)
    options = {"num_inference_steps": 2, "output_type": "pt", "attributes": {"Smiling": True}}
    frames = pipeline.interpolate(4, noises, **options)
    assert len(frames) == 7
    ends = pipeline(options["attributes"], 3, latents=noises, num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(frames[[0, 3, 6]], ends, atol=1e-5, rtol=0)
    # By hand: the middle of an arc halves the angle and keeps the length, for noises of one length.
    start, end = noises[0] / noises[0].norm(), noises[1] / noises[1].norm()
    (middle,) = slerp(start, end, torch.tensor([0.5]))
    assert middle.norm() == pytest.approx(1, abs=1e-5)
    assert (middle * start).sum() == pytest.approx((middle * end).sum().item(), abs=1e-5)
    assert torch.equal(slerp(start, start, torch.tensor([0.3]))[0], start)
    assert len(pipeline.interpolate(2, generator=torch.Generator().manual_seed(0), num_inference_steps=1)) == 2
    with pytest.raises(ValueError, match="at least two noises and two frames"):
        pipeline.interpolate(1, noises)


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


def test_loads_plainly_in_a_fresh_process_with_the_same_pixels(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "pipeline")
    code = (
        "import dit_hf, numpy, torch; from diffusers import DiffusionPipeline;"
        f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path / 'pipeline')!r});"
        "images = pipe({'class': 'cat'}, num_inference_steps=3, generator=torch.Generator().manual_seed(0), "
        "output_type='np').images;"
        f"numpy.save({str(tmp_path / 'images.npy')!r}, images)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert np.array_equal(np.load(tmp_path / "images.npy"), run(pipeline, {"class": "cat"}))


def test_vae_can_be_given_at_loading(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    assert DiffusionPipeline.from_pretrained(tmp_path, vae=None).vae is None


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
        ({"attributes": {"Smilling": True}}, "valid names are Smiling, class"),
        ({"attributes": {"class": "cow"}}, "valid values are cat, dog, owl"),
        ({"attributes": {"class": 3}}, "between 0 and 2"),
        ({"attributes": {"Smiling": 0.9}}, "expected Smiling between 0 and 1, got 0.9"),
        ({"attributes": {"Smiling": [1]}}, r"expected Smiling between 0 and 1, got \[1\]"),
        ({"attributes": {"Smiling": float("nan")}}, "expected Smiling between 0 and 1, got nan"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0 must be at least 1"),
        ({"attributes": [{}, {}], "batch_size": 3}, "2 rows"),
        ({"attributes": []}, "at least one"),
        ({"attributes": "Smiling"}, "expected a dict like"),
        ({"attributes": ["Smiling"]}, "expected a dict like"),
        ({"batch_size": 0}, "at least one"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"expected \[1, 4"),
        ({"output_type": "jpg"}, "expected output_type pil"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
        ({"batch_size": 2, "generator": [torch.Generator()]}, "1 generators for 2"),
    ],
)
def test_invalid_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()(**{"num_inference_steps": 1, **options})
