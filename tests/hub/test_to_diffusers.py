"""The export to diffusers' own pipeline."""

import numpy as np
import pytest
import torch
from conftest import tiny_transformer, tiny_vae
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, DPMSolverMultistepScheduler

from dit_hf import CosineLatentScheduler, LatentDiTPipeline
from dit_hf.hub.to_diffusers import to_builtin

STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [0.5, 1.0, 2.0, 3.0]}


def pipeline(conditions, steps=500, vae=None, options=None, **transformer):
    transformer = {"timestep_freq_shift": 1.0, **transformer}
    made = LatentDiTPipeline(
        tiny_transformer(conditions=conditions, **transformer),
        CosineLatentScheduler(steps, prediction_type="v_prediction"),
        tiny_vae() if vae is None else vae,
        guidance_scale=2.0,
        **{**STATISTICS, **(options or {})},
    )
    made.set_progress_bar_config(disable=True)
    return made


def outputs(made, export, rows, labels):
    """Return the outputs of both transformers for the same noisy latents."""
    noisy, timesteps = torch.randn(len(rows), 4, 8, 8), torch.arange(len(rows)) * 7
    with torch.no_grad():
        ours = made.transformer(noisy, timesteps, made.encode_attributes(rows)).sample
        return ours, export.pipeline.transformer(noisy, timesteps, torch.tensor(labels)).sample


def test_classes_keep_their_numbers_and_the_null_is_row_1000(tmp_path):
    made = pipeline({"class": 3}, options={"condition_labels": {"class": ["cat", "dog", "owl"]}})
    export = to_builtin(made)
    assert export.difference < 1e-5
    torch.testing.assert_close(*outputs(made, export, [{"class": i} for i in range(3)] + [{}], [0, 1, 2, 1000]))
    export.pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.get_label_ids(["owl", "cat"]) == [2, 0]
    options = {"num_inference_steps": 10, "output_type": "np"}
    images = loaded([1], guidance_scale=3.0, generator=torch.Generator().manual_seed(3), **options).images
    ours = made({"class": "dog"}, guidance_scale=3.0, generator=torch.Generator().manual_seed(3), **options).images
    np.testing.assert_allclose(images, ours, atol=1e-5)
    loaded.scheduler = DPMSolverMultistepScheduler.from_config(loaded.scheduler.config)
    assert np.isfinite(loaded([1], num_inference_steps=3, output_type="np").images).all()


def test_of_several_conditions_one_row_is_baked_in():
    made = pipeline({"Smiling": 2, "Male": 2, "class": 3})
    row = {"Smiling": True, "class": 2}
    export = to_builtin(made, row)
    assert export.difference < 1e-5
    torch.testing.assert_close(*outputs(made, export, [row, row, {}], [0, 999, 1000]))
    assert "{'Smiling': True, 'class': 2}" in export.labels


def test_unconditional_and_a_learned_sigma():
    for options in ({}, {"out_channels": 8}):
        made = pipeline(None, **options)
        export = to_builtin(made)
        assert export.difference < 1e-5
        torch.testing.assert_close(*outputs(made, export, [{}, {}], [5, 1000]))


@pytest.mark.parametrize("convs", [True, False])
def test_statistics_are_folded_into_both_ends_of_a_copy_of_the_vae(convs):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "scaling_factor": 0.7, "shift_factor": 0.3}
    vae = AutoencoderKL(**blocks, **sizes, use_quant_conv=convs, use_post_quant_conv=convs).eval()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    folded = to_builtin(pipeline({"class": 3}, vae=vae)).pipeline.vae
    assert all(torch.equal(before[name], tensor) for name, tensor in vae.state_dict().items())
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in STATISTICS.values())
    latents, pixels = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(folded.decode(latents).sample, vae.decode(latents * std + mean).sample)
        ours, posterior = vae.encode(pixels).latent_dist, folded.encode(pixels).latent_dist
    torch.testing.assert_close(posterior.mean, (ours.mean - mean) / std)
    torch.testing.assert_close(posterior.std, ours.std / std)
    assert folded.config.scaling_factor == 1
    assert folded.config.shift_factor is None


def test_other_frequencies_of_the_timesteps_are_fitted():
    """Exactly if the model is as wide as there are timesteps, closely otherwise."""
    exact = to_builtin(pipeline({"class": 3}, steps=20, timestep_freq_shift=0.0))
    assert exact.difference < 1e-5
    made = pipeline({"class": 3}, timestep_freq_shift=0.0)
    export = to_builtin(made)
    timesteps = torch.arange(500)
    embedder = export.pipeline.transformer.transformer_blocks[1].norm1.emb
    with torch.no_grad():
        ours = made.transformer.time_embedding(made.transformer.time_proj(timesteps))
        features = embedder.time_proj(timesteps)
        unfitted = made.transformer.time_embedding(features)
        fitted = embedder.timestep_embedder(features)
    assert (fitted - ours).norm() < 0.2 * (unfitted - ours).norm()  # with 24 units for 500 timesteps


@pytest.mark.parametrize(
    ("options", "attributes", "message"),
    [
        ({"sample_size": (8, 4)}, None, "latents of 8x4"),
        ({"position_base_size": 4}, None, "stretched over 4x4 latents"),
        ({"qk_norm": "rms_norm"}, None, "no qk_norm='rms_norm'"),
        ({"mlp_ratio": 2.0}, None, "no mlp_ratio=2.0"),
        ({"conditions": {"Smiling": 2, "Male": 2}}, None, "several conditions; choose their values"),
        ({"conditions": {"class": 1001}}, None, "more than 1000 classes"),
        ({"conditions": None}, {"Smiling": True}, "unconditional"),
        ({}, {"Smiling": True}, "'Smiling' is unknown"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_the_reason(options, attributes, message):
    options = {"conditions": {"class": 3}, **options}
    with pytest.raises(ValueError, match=message):
        to_builtin(pipeline(**options), attributes)


def test_another_kind_of_vae_is_refused():
    vae = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                          num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    with pytest.raises(ValueError, match="VAE is AutoencoderTiny"):
        to_builtin(pipeline({"class": 3}, vae=vae))
