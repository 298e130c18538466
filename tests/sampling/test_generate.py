import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image

from dit_hf.latents.vae import weights_sha256
from dit_hf.runs import load_pipeline
from dit_hf.sampling.generate import batches, generate_images, to_uint8
from dit_hf.training.trainer import train


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_image_is_in_one_batch_on_any_number_of_ranks(num_ranks):
    whole = batches(10, 4)
    assert whole == [range(4), range(4, 8), range(8, 10)]
    shared = [batch for rank in range(num_ranks) for batch in batches(10, 4, rank, num_ranks)]
    assert sorted(shared, key=lambda batch: batch.start) == whole


def test_an_image_is_a_function_of_seed_and_number():
    pipeline, rows = tiny_pipeline(), [{"Smiling": True}, {"class": "owl"}, {}]
    options = {"num_inference_steps": 2, "eta": 1.0}
    together = generate_images(pipeline, range(2, 6), rows, 7, **options)
    assert together.shape == (4, 16, 16, 3)
    assert together.dtype == np.uint8
    for place, image in enumerate(range(2, 6)):
        alone = generate_images(pipeline, [image], rows, 7, **options).astype(int)
        assert np.abs(alone[0] - together[place]).max() <= 1
    again = generate_images(pipeline, [4], [rows[1]], 7, **options).astype(int)
    assert np.abs(again[0] - together[2]).max() <= 1
    assert np.abs(generate_images(pipeline, [4], rows, 8, **options).astype(int)[0] - together[2]).max() > 10


def test_images_are_rounded_as_diffusers_does_for_pil():
    pixels = torch.rand(2, 3, 5, 4) * 1.2 - 0.1
    expected = [
        tiny_pipeline().image_processor.numpy_to_pil(p.permute(1, 2, 0).clamp(0, 1).numpy())[0] for p in pixels
    ]
    assert np.array_equal(to_uint8(pixels), np.stack([np.asarray(image) for image in expected]))


def test_a_pipeline_by_its_folder_and_by_its_runs(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "run" / "pipeline")
    for name in ("run", "run/pipeline"):
        assert load_pipeline(str(tmp_path / name)).config.guidance_scale == 2.0
    with pytest.raises(ValueError, match=r"nowhere: no pipeline could be loaded from there \("):
        load_pipeline(str(tmp_path / "nowhere"))
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="no pipeline could be loaded"):
        load_pipeline(str(tmp_path / "x.png"))


def test_torch_may_be_built_for_a_missing_gpu(tmp_path, monkeypatch):
    """PyPI's torch for Linux names CUDA as its accelerator, unless it is made to check."""

    def accelerator(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", accelerator)
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    assert load_pipeline(str(tmp_path / "pipeline")).device.type == "cpu"


def test_a_checkpoint_is_a_model_too(config):
    run = train(config)
    last, earlier = load_pipeline(f"{run}/checkpoint-8", "cpu"), load_pipeline(f"{run}/checkpoint-4", "cpu")
    exported = load_pipeline(str(run), "cpu")
    images = [
        generate_images(pipeline, [0], [{"Smiling": 1}], 0, num_inference_steps=2) for pipeline in (last, exported)
    ]
    assert np.array_equal(*images)
    for name in ("guidance_scale", "condition_labels", "latents_mean", "latents_std"):
        assert last.config[name] == exported.config[name]
    assert weights_sha256(earlier.transformer) != weights_sha256(last.transformer)
    assert load_pipeline(f"{run}/checkpoint-4", "cpu", dtype=torch.bfloat16, vae=None).dtype == torch.bfloat16
    # Without its export the run is not a model, and the error names those that are.
    shutil.rmtree(run / "pipeline")
    with pytest.raises(ValueError, match=rf"the run is not finished; name one of its checkpoints \({run}/checkpoint-"):
        load_pipeline(str(run))
    weights = run / "checkpoint-4" / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="checkpoint-4 is damaged"):
        load_pipeline(f"{run}/checkpoint-4")
