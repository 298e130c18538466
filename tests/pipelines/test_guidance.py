"""Guidance: a single step from the noisiest level, against the formulas written by hand."""

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline, tiny_transformer
from pipeline_calls import run


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
        ({"negative_attributes": 3}, "expected a dict like .* got negative_attributes=3"),
        ({"attribute_weights": ["Smiling"]}, "expected a dict of numbers"),
        ({"attribute_weights": {"Smiling": "x"}}, "expected a dict of numbers"),
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


# Dynamic guidance, as diffusers documents it.


def test_a_callback_turns_guidance_off_for_the_remaining_steps():
    pipeline, seen, batches = tiny_pipeline(), [], []
    pipeline.transformer.register_forward_pre_hook(lambda _module, args: batches.append(len(args[0])))

    def callback_dynamic_cfg(pipe, step_index, timestep, callback_kwargs):
        seen.append((pipe.guidance_scale, pipe.do_classifier_free_guidance))
        if step_index == int(pipe.num_timesteps * 0.4):
            pipe._guidance_scale = 0.0
        return callback_kwargs

    row = {"Smiling": True}
    out = run(pipeline, row, num_inference_steps=5, guidance_scale=3.0, callback_on_step_end=callback_dynamic_cfg)
    assert seen == [(3.0, True)] * 3 + [(0.0, False)] * 2
    assert batches == [2, 2, 2, 1, 1]
    expected = run(pipeline, row, num_inference_steps=5, guidance_scale=3.0, guidance_end=0.6)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    # The next call has its own scale again.
    assert not np.array_equal(run(pipeline, row, num_inference_steps=5), expected)
    assert pipeline.guidance_scale == 2.0


def test_a_callback_changes_the_scale_and_turns_guidance_on():
    pipeline, latents = tiny_pipeline(), torch.randn(1, 4, 8, 8)
    row = {"Smiling": True, "class": "owl"}

    def change(pipe, step, _timestep, tensors):
        pipe._guidance_scale = 4.0
        # From the initial noise again, so that the second step alone decides.
        return {"latents": latents} if step == 0 else tensors

    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    out = run(pipeline, row, callback_on_step_end=change, **options)
    t = torch.tensor([249.0])
    with torch.no_grad():
        free, requested = (pipeline.transformer(latents, t, torch.tensor([ids])).sample for ids in ([2, 3], [1, 2]))
    expected = pipeline.scheduler.predict_original_sample(free + 4.0 * (requested - free), t, latents)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_a_scale_of_1_or_less_is_no_guidance(scale):
    pipeline = tiny_pipeline()
    requested = run(pipeline, {"Smiling": True}, guidance_start=1.0)
    assert np.array_equal(run(pipeline, {"Smiling": True}, guidance_scale=scale), requested)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf"), "3"])
def test_scales_that_are_none_are_refused(scale):
    with pytest.raises(ValueError, match=r"guidance_scale=.* must be a number of at least 0"):
        run(tiny_pipeline(), {"Smiling": True}, guidance_scale=scale)


def test_the_state_of_a_call_can_be_read_before_the_first_one():
    pipeline = tiny_pipeline(guidance_scale=3.0)
    assert (pipeline.guidance_scale, pipeline.do_classifier_free_guidance) == (3.0, True)
    assert (pipeline.num_timesteps, pipeline.interrupt) == (0, False)
