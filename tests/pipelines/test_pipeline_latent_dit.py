import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline, tiny_transformer
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

from dit_hf import CosineLatentScheduler, LatentDiTPipeline


def run(pipeline, *args, seed=0, **options):
    options = {"num_inference_steps": 3, "output_type": "np", **options}
    options.setdefault("generator", torch.Generator().manual_seed(seed))
    return pipeline(*args, **options).images


def test_draws_pictures_of_every_kind():
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


def test_a_generator_an_image_makes_batches_irrelevant():
    pipeline = tiny_pipeline()
    together = run(pipeline, batch_size=2, generator=[torch.Generator().manual_seed(s) for s in (4, 5)])
    alone = [run(pipeline, seed=s)[0] for s in (4, 5)]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)


def test_attributes_in_all_their_spellings():
    pipeline = tiny_pipeline()
    assert pipeline.encode_attributes(None, 2).tolist() == [[2, 3], [2, 3]]
    rows = [{"Smiling": True, "class": "dog"}, {"class": 2, "Smiling": None}, {"Smiling": False}, {}]
    assert pipeline.encode_attributes(rows).tolist() == [[1, 1], [2, 2], [0, 3], [2, 3]]
    assert len(run(pipeline, rows)) == 4
    assert len(run(pipeline, {"Smiling": True}, batch_size=2, num_images_per_prompt=2)) == 4
    assert not np.array_equal(run(pipeline, {"Smiling": True}), run(pipeline, {"Smiling": False}))


def test_guidance_is_the_formula_and_comes_from_the_config():
    pipeline = tiny_pipeline(guidance_scale=3.0)
    asked = {"Smiling": True, "class": "owl"}
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    out = run(pipeline, asked, latents=latents, num_inference_steps=1, output_type="latent")
    # By hand: one step from the noisiest level to the clean latent of the guided prediction.
    t = torch.tensor([499.0])
    with torch.no_grad():
        free, conditional = (pipeline.transformer(latents, t, ids).sample for ids in (None, torch.tensor([[1, 2]])))
    guided = free + 3.0 * (conditional - free)
    torch.testing.assert_close(out, pipeline.scheduler.predict_original_sample(guided, t, latents))
    assert torch.equal(
        out, run(pipeline, asked, latents=latents, num_inference_steps=1, output_type="latent", guidance_scale=3.0)
    )
    unguided = run(pipeline, asked, latents=latents, num_inference_steps=1, output_type="latent", guidance_scale=1.0)
    torch.testing.assert_close(unguided, pipeline.scheduler.predict_original_sample(conditional, t, latents))


def test_guidance_has_no_effect_where_nothing_is_asked_for():
    pipeline = tiny_pipeline()
    assert np.array_equal(run(pipeline, guidance_scale=1.0), run(pipeline, guidance_scale=7.0))
    np.testing.assert_allclose(run(pipeline, {}, guidance_scale=7.0), run(pipeline), atol=1e-5)


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


def test_other_sizes_than_trained_by_their_latents():
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


def test_eta_adds_noise():
    pipeline = tiny_pipeline()
    assert not np.array_equal(run(pipeline, eta=1.0), run(pipeline))


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


def test_stock_scheduler_and_half_precision():
    pipeline = tiny_pipeline()
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    assert np.isfinite(run(pipeline, {"Smiling": True})).all()
    full = run(tiny_pipeline(), {"Smiling": True})
    half = run(tiny_pipeline().to(torch.bfloat16), {"Smiling": True}, latents=None)
    assert np.abs(full - half).mean() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attributes": {"Smilling": True}}, "known are Smiling, class"),
        ({"attributes": {"class": "cow"}}, "known are cat, dog, owl"),
        ({"attributes": {"class": 3}}, "between 0 and 2"),
        ({"attributes": [{}, {}], "batch_size": 3}, "2 rows"),
        ({"attributes": []}, "at least one"),
        ({"attributes": "Smiling"}, "must be a dict like"),
        ({"attributes": ["Smiling"]}, "must be a dict like"),
        ({"batch_size": 0}, "at least one"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"expected \[1, 4"),
        ({"output_type": "jpg"}, "known are pil"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
        ({"batch_size": 2, "generator": [torch.Generator()]}, "1 generators for 2"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()(**{"num_inference_steps": 1, **options})
