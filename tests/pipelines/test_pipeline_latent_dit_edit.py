import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from diffusers import DPMSolverMultistepScheduler

from dit_hf import CosineLatentScheduler, LatentDiTEditPipeline, LatentDiTPipeline
from dit_hf.data.avatars import choose_face, render_face


@pytest.fixture
def pipeline():
    pipeline = LatentDiTEditPipeline(**tiny_pipeline().components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def face(seed=0, size=16):
    return render_face(choose_face(seed, 0), size)


def psnr(first, second):
    return -10 * np.log10(np.square(first - second).mean())


def decoded(pipeline, image):
    return pipeline.decode_latents(pipeline.encode_images(image), "np")


def test_without_strength_the_image_is_returned(pipeline):
    options = {"image": face(), "attributes": {"Smiling": True}, "edit": {"class": "owl"}, "output_type": "np"}
    assert psnr(pipeline(**options, edit_strength=0.0).images, decoded(pipeline, face())) > 30
    changes = [
        np.abs(pipeline(**options, edit_strength=strength).images - decoded(pipeline, face())).mean()
        for strength in (0.0, 0.5, 2.0)
    ]
    assert changes[0] < changes[1] < changes[2]


def test_outside_the_interval_of_guidance_the_image_stays(pipeline):
    options = {"image": face(), "attributes": {"class": "dog"}, "edit": {"class": "owl"}, "output_type": "np"}
    for edit_strength, interval in ((0.0, (0.3, 0.6)), (2.0, (0.5, 0.5))):
        start, end = interval
        outputs = pipeline(**options, edit_strength=edit_strength, guidance_start=start, guidance_end=end).images
        assert psnr(outputs, decoded(pipeline, face())) > 30


def test_inverted_noise_generates_the_image_under_its_own_attributes(pipeline):
    faces, rows = [face(0), face(1)], [{"Smiling": True}, {"class": "dog"}]
    noise = pipeline.invert(faces, rows)
    assert noise.shape == (2, 4, 8, 8)
    plain = LatentDiTPipeline(**pipeline.components)
    plain.set_progress_bar_config(disable=True)
    options = {"latents": noise, "guidance_scale": 1.0, "num_inference_steps": 50, "output_type": "np"}
    plain.scheduler = CosineLatentScheduler.from_config(plain.scheduler.config, multistep=False)
    same, other = plain(rows, **options).images, plain([{"Smiling": False}, {"class": "cat"}], **options).images
    assert psnr(same, decoded(pipeline, faces)) > 30
    assert psnr(other, decoded(pipeline, faces)) < psnr(same, decoded(pipeline, faces))


def test_guidance_goes_from_the_images_own_attributes_to_the_requested_ones(pipeline):
    """Compute one step from the noise by hand."""
    steps = {"num_inference_steps": 1}
    noise = pipeline.invert(face(), {"Smiling": False, "class": "cat"}, **steps)
    t = torch.tensor([499.0])
    with torch.no_grad():
        own, requested = (pipeline.transformer(noise, t, torch.tensor([ids])).sample for ids in ([0, 0], [1, 0]))
    expected = pipeline.scheduler.predict_original_sample(own + 1.5 * 2.0 * (requested - own), t, noise)
    options = {"attributes": {"Smiling": False, "class": "cat"}, "edit": {"Smiling": True}, "edit_strength": 1.5}
    out = pipeline(image=face(), output_type="latent", **options, **steps).images
    torch.testing.assert_close(out, expected)


def test_partial_inversion_keeps_more(pipeline):
    options = {"image": face(), "edit": {"class": "owl"}, "edit_strength": 3.0, "output_type": "np"}
    near, far = (
        np.abs(pipeline(**options, strength=strength).images - decoded(pipeline, face())).mean()
        for strength in (0.2, 1.0)
    )
    assert near < far
    np.testing.assert_allclose(pipeline(**options, strength=0.0).images, decoded(pipeline, face()), atol=1e-5)


def test_a_stock_scheduler_is_restored(pipeline):
    options = {"image": face(), "edit": {"class": "owl"}, "output_type": "np", "num_inference_steps": 5}
    expected = pipeline(**options).images
    settings = {"timestep_spacing": "leading"}  # impossible with ours
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **settings)
    np.testing.assert_allclose(pipeline(**options).images, expected, atol=1e-5)
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)


def test_interpolation_begins_and_ends_with_the_images(pipeline):
    frames = pipeline.interpolate_images([face(0), face(1)], 4, output_type="np")
    assert frames.shape == (4, 16, 16, 3)
    assert psnr(frames[[0, 3]], decoded(pipeline, [face(0), face(1)])) > 30


def test_one_image_with_several_edits_and_several_images_with_one(pipeline):
    options = {"num_inference_steps": 2, "output_type": "np"}
    edits = [{"class": name} for name in ("cat", "dog", "owl")]
    assert len(pipeline(image=face(), edit=edits, **options).images) == 3
    both = pipeline(image=[face(0), face(1)], attributes=[{"Smiling": True}, {}], edit={"class": "owl"}, **options)
    assert len(both.images) == 2
    one = pipeline(image=face(1), edit={"class": "owl"}, **options).images
    np.testing.assert_allclose(both.images[1:], one, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": None}, "an image is needed"),
        ({"edit": None}, "edit= is needed"),
        ({"edit": "Hat"}, "expected a dict like {'Smiling': True} or a list of dicts, got edit='Hat'"),
        ({"edit": {"Hat": True}}, "'Hat' is unknown"),
        ({"edit": [{"class": 0}, {"class": 1}], "attributes": [{}, {}, {}]}, "2 rows of attributes for 3 images"),
    ],
)
def test_invalid_arguments_are_refused(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**{"image": face(), "edit": {"class": "owl"}, "num_inference_steps": 1, **options})
