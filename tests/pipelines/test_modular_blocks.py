"""Modular pipelines generate the pixels of the pipelines, with dit_hf and without, and take diffusers' guiders."""

import copy
import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    FirstBlockCacheConfig,
    LTX2Guidance,
    ModularPipeline,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    guiders,
)
from diffusers.guiders import MagnitudeAwareGuidance
from diffusers.hooks import LayerSkipConfig
from PIL import Image
from repositories import run_without_dit_hf

from dit_hf import (
    LatentDiTAutoBlocks,
    LatentDiTEditPipeline,
    LatentDiTImg2ImgPipeline,
    LatentDiTInpaintPipeline,
    LatentDiTPipeline,
)
from dit_hf.data.avatars import choose_face, render_face

OWL = {"Smiling": True, "class": "owl"}
# Each task: its pipeline, and the inputs of which its blocks are chosen.
TASKS = {
    "generation": (LatentDiTPipeline, {"attributes": [OWL, {}], "num_images_per_prompt": 2, "eta": 1.0}),
    "img2img": (LatentDiTImg2ImgPipeline, {"image": "face.png", "attributes": OWL, "attribute_weights": {"class": 2}}),
    "inpainting": (
        LatentDiTInpaintPipeline,
        {"image": ["face.png", "face.png"], "mask_image": "mask.png", "attributes": OWL, "num_images_per_prompt": 2},
    ),
    "edit": (LatentDiTEditPipeline, {"image": "face.png", "attributes": OWL, "edit": {"class": "cat"}}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modular")
    tiny_pipeline(latents_mean=[1.0, 2.0, 3.0, 4.0]).save_pretrained(folder / "model")
    render_face(choose_face(0, 0), 24).save(folder / "face.png")
    mask = Image.new("L", (24, 24))
    mask.paste(255, (0, 0, 12, 24))
    mask.save(folder / "mask.png")
    return folder


@pytest.fixture
def folder(made, monkeypatch):
    """A folder with an image, a mask and `model`, to work in."""
    monkeypatch.chdir(made)
    return made


def modular(folder="model", **components):
    """A modular pipeline of a folder, with dit_hf."""
    pipe = LatentDiTAutoBlocks().init_pipeline(str(folder))
    pipe.load_components()
    pipe.update_components(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs_of(task, **inputs):
    return {"num_inference_steps": 3, "output_type": "np", **TASKS[task][1], **inputs}


def images_of(task):
    """The images of a task by its pipeline."""
    pipe = TASKS[task][0].from_pretrained("model")
    pipe.set_progress_bar_config(disable=True)
    generator = {} if task == "edit" else {"generator": torch.Generator().manual_seed(0)}
    return pipe(**inputs_of(task), **generator).images


def test_without_dit_hf_every_task_gives_the_pixels_of_its_pipeline(folder):
    code = """
import json, numpy, torch
from diffusers import ModularPipeline
pipe = ModularPipeline.from_pretrained("model", trust_remote_code=True)
pipe.load_components()
for task, inputs in json.loads(sys.argv[1]).items():
    images = pipe(**inputs, generator=torch.Generator().manual_seed(0), output="images")
    numpy.save(f"{task}.npy", images)
# What is saved of the parts loads, too.
pipe.save_pretrained("again", overwrite_modular_index=True)
again = ModularPipeline.from_pretrained("again")
again.load_components()
assert numpy.array_equal(again(**inputs, output="images"), images)
assert not any(name.partition(".")[0] == "dit_hf" for name in sys.modules)
"""
    run_without_dit_hf(code, json.dumps({task: inputs_of(task) for task in TASKS}))
    for task in TASKS:
        assert np.array_equal(np.load(f"{task}.npy"), images_of(task)), task


def test_the_image_is_returned_as_it_is_asked_for(folder, capsys):
    pipe = modular()
    inputs = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    state = pipe(**inputs)
    assert isinstance(state.images[0], Image.Image)
    latents = pipe(image="face.png", mask_image="mask.png", output_type="latent", output="images", **inputs)
    assert latents.shape == (1, 4, 8, 8)
    assert "%|" not in capsys.readouterr().err  # the progress bar, which `modular` turns off
    pipe.set_progress_bar_config()
    pipe(**inputs)
    assert "100%|" in capsys.readouterr().err


def test_a_part_of_the_blocks_works_alone(folder):
    whole = modular()
    expected = images_of("img2img")
    # Encode first, and vary the latents later, without the encoder.
    encoder = LatentDiTAutoBlocks().sub_blocks["encode"].init_pipeline("model")
    encoder.load_components()
    image_latents = encoder(image="face.png", output="image_latents")
    inputs = inputs_of("img2img", image=None, image_latents=image_latents)
    images = whole(**inputs, generator=torch.Generator().manual_seed(0), output="images")
    assert np.array_equal(images, expected)


def test_a_workflow_has_only_its_own_inputs(folder):
    pipe = ModularPipeline.from_pretrained("model", trust_remote_code=True, workflow="img2img")
    assert {"image", "strength"} < {*pipe.default_call_parameters}
    assert not {"mask_image", "edit", "batch_size"} & {*pipe.default_call_parameters}
    pipe.load_components()
    pipe.set_progress_bar_config(disable=True)
    inputs = inputs_of("img2img", generator=torch.Generator().manual_seed(0))
    assert np.array_equal(pipe(**inputs, output="images"), images_of("img2img"))


def test_every_input_is_described_and_has_the_pipelines_default(folder):
    blocks = LatentDiTAutoBlocks()
    assert [spec.name for spec in blocks.inputs if not spec.description] == []
    for name in TASKS:
        own = inspect.signature(TASKS[name][0].__call__).parameters
        (block,) = (each for key, each in blocks.sub_blocks["denoise"].sub_blocks.items() if key == name)
        for spec in block.inputs:
            assert spec.name not in own or spec.required or spec.default == own[spec.name].default, (name, spec)
    assert "0.6" in blocks.doc


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"image": "face.png", "mask_image": "mask.png", "edit": OWL}, "pass one of the two"),
        ({"mask_image": "mask.png"}, "'image' is missing"),
        ({"edit": OWL}, "'image_latents' is missing"),
        ({"image": "face.png", "edit": {}}, "edit= is needed"),
        ({"image": "face.png", "strength": 2}, "strength=2 must be between 0 and 1"),
        ({"attributes": {"Tall": True}}, "'Tall' is unknown"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(folder, inputs, message):
    with pytest.raises(ValueError, match=message):
        modular()(**inputs)


# Guiders: three steps, against their formulas written by hand.


def guided_by_hand(pipe, latents, formula):
    """Denoise three steps; `formula(step, requested, free, ids, latents, timestep)` is the guided prediction."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(3)
    ids = torch.tensor([[1, 2]])
    for step, timestep in enumerate(scheduler.timesteps):
        requested, free = (predict(pipe.transformer, latents, timestep, each) for each in (ids, None))
        guided = formula(step, requested, free, ids, latents, timestep)
        latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
    return latents


def predict(transformer, latents, timestep, ids):
    with torch.no_grad():
        return transformer(latents, timestep.expand(1), ids).sample


def guided(pipe, guider, latents, **inputs):
    pipe.update_components(guider=guider)
    inputs = {"attributes": OWL, "latents": latents, "num_inference_steps": 3, "output_type": "latent", **inputs}
    return pipe(**inputs, output="images")


def test_classifier_free_guidance_is_its_formula(folder):
    pipe, latents = modular(), torch.randn(1, 4, 8, 8)
    expected = guided_by_hand(pipe, latents, lambda _step, requested, free, *_: free + 3.0 * (requested - free))
    torch.testing.assert_close(guided(pipe, ClassifierFreeGuidance(guidance_scale=3.0), latents), expected)
    # It is the guidance that a pipeline has without a guider.
    torch.testing.assert_close(guided(pipe, None, latents, guidance_scale=3.0), expected)


def test_adaptive_projected_guidance_is_its_formula(folder):
    """Equations 5 to 8 of https://arxiv.org/abs/2410.02416: momentum, a bound on the norm, less that is parallel."""
    pipe, latents = modular(), torch.randn(1, 4, 8, 8)
    scale, momentum, bound, eta = 4.0, -0.5, 0.4, 0.25
    average = torch.zeros(1, 4, 8, 8)

    def formula(_step, requested, free, *_):
        nonlocal average
        average = (requested - free) + momentum * average
        difference = average * min(1.0, bound / average.square().sum().sqrt().item())
        along = (difference * requested).sum() / requested.square().sum() * requested
        return free + scale * ((difference - along) + eta * along)

    guider = AdaptiveProjectedGuidance(
        guidance_scale=scale,
        adaptive_projected_guidance_momentum=momentum,
        adaptive_projected_guidance_rescale=bound,
        eta=eta,
    )
    out = guided(pipe, guider, latents)
    torch.testing.assert_close(out, guided_by_hand(pipe, latents, formula), rtol=1e-4, atol=1e-5)
    # The momentum does not go over into the next call.
    assert torch.equal(guided(pipe, guider, latents), out)


def test_autoguidance_steers_away_from_the_model_without_a_block(folder):
    pipe, latents = modular(), torch.randn(1, 4, 8, 8)
    weaker = copy.deepcopy(pipe.transformer)
    del weaker.transformer_blocks[1]

    def formula(_step, requested, _free, _ids, latents, timestep):
        weak = predict(weaker, latents, timestep, None)
        return weak + 2.5 * (requested - weak)

    guider = AutoGuidance(guidance_scale=2.5, auto_guidance_config=LayerSkipConfig(indices=[1]))
    before = predict(pipe.transformer, latents, torch.tensor(9.0), None)
    torch.testing.assert_close(guided(pipe, guider, latents), guided_by_hand(pipe, latents, formula))
    # The model itself is left as it was.
    assert torch.equal(predict(pipe.transformer, latents, torch.tensor(9.0), None), before)


def test_perturbed_attention_guidance_steers_away_from_attention_that_looks_nowhere_else(folder):
    """Equation 15 of https://arxiv.org/abs/2403.17377: each token attends to itself alone, by a mask here."""
    pipe, latents = modular(), torch.randn(1, 4, 8, 8)
    perturbed = copy.deepcopy(pipe.transformer)

    def attend_to_itself(attn, hidden_states, **_):
        return attn.to_out[0](attn.to_v(hidden_states))

    perturbed.transformer_blocks[0].attn.processor = attend_to_itself

    def formula(step, requested, free, ids, latents, timestep):
        out = free + 3.0 * (requested - free)
        if step == 0:  # diffusers begins after the first step
            return out
        return out + 1.5 * (requested - predict(perturbed, latents, timestep, ids))

    options = {"guidance_scale": 3.0, "perturbed_guidance_scale": 1.5, "perturbed_guidance_layers": [0]}
    guider = PerturbedAttentionGuidance(**options, perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0)
    torch.testing.assert_close(guided(pipe, guider, latents), guided_by_hand(pipe, latents, formula))


LAYERS = {
    AutoGuidance: {"auto_guidance_config": LayerSkipConfig(indices=[1])},
    PerturbedAttentionGuidance: {"perturbed_guidance_layers": [0], "perturbed_guidance_stop": 1.0},
    SkipLayerGuidance: {"skip_layer_config": LayerSkipConfig(indices=[0]), "skip_layer_guidance_stop": 1.0},
    SmoothedEnergyGuidance: {"seg_guidance_layers": [0], "seg_guidance_stop": 1.0},
}
REFUSED = {
    LTX2Guidance: "which models of video with sound predict",
    # In diffusers 0.41 to 0.42.1, for predictions of tokens alone.
    MagnitudeAwareGuidance: r"cannot combine predictions of \[\d, 4, 8, 8\]",
}
GUIDERS = sorted(
    (kind for kind in vars(guiders).values() if inspect.isclass(kind) and kind is not diffusers.BaseGuidance),
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", GUIDERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("task", ["generation", "edit"])
def test_every_guider_of_diffusers_guides_or_says_why_not(folder, task, kind):
    try:
        guider = kind(**LAYERS.get(kind, {}))
    except ImportError as error:
        assert "kornia" in str(error)  # noqa: PT017 (not every machine lacks it)
        return
    pipe, inputs = modular(guider=guider), inputs_of(task, num_inference_steps=4)
    inputs["generator"] = torch.Generator().manual_seed(0)
    if kind in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[kind]):
            pipe(**inputs)
        return
    images = pipe(**inputs, output="images")
    assert np.isfinite(images).all()
    guider.disable()
    inputs["generator"] = torch.Generator().manual_seed(0)
    assert not np.array_equal(pipe(**inputs, output="images"), images)


def test_negative_attributes_replace_the_unconditional_prediction_of_a_guider(folder):
    pipe, latents = modular(), torch.randn(1, 4, 8, 8)
    away = torch.tensor([[0, 0]])

    def formula(_step, requested, _free, _ids, latents, timestep):
        negative = predict(pipe.transformer, latents, timestep, away)
        return negative + 3.0 * (requested - negative)

    guider = ClassifierFreeGuidance(guidance_scale=3.0)
    out = guided(pipe, guider, latents, negative_attributes={"Smiling": False, "class": "cat"})
    torch.testing.assert_close(out, guided_by_hand(pipe, latents, formula))


@pytest.mark.parametrize(
    ("task", "inputs", "message"),
    [
        ("generation", {"guidance_scale": 3.0}, "guidance_scale=3.0 has no effect with a guider: set it on the Cla"),
        ("img2img", {"guidance_rescale": 0.5}, "guidance_rescale=0.5 has no effect"),
        ("edit", {"edit_strength": 2.0}, "edit_strength=2.0 has no effect with a guider"),
    ],
)
def test_options_that_a_guider_has_itself_are_refused(folder, task, inputs, message):
    pipe = modular(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    with pytest.raises(ValueError, match=message):
        pipe(**inputs_of(task, **{"attribute_weights": None, **inputs}))


def test_a_guider_works_with_a_feature_cache(folder):
    pipe, latents = modular(), torch.randn(1, 4, 8, 8)
    guider = ClassifierFreeGuidance(guidance_scale=3.0)
    expected = guided(pipe, guider, latents)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    for _ in range(2):
        torch.testing.assert_close(guided(pipe, guider, latents), expected)
