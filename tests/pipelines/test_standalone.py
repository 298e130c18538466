"""The code in a saved pipeline, which loads without dit_hf."""

import numpy as np
import torch
from conftest import tiny_pipeline
from diffusers import DiffusionPipeline
from repositories import assert_no_leaks, run_without_dit_hf

from dit_hf import LatentDiTPipeline

CALL = "num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type='np').images"


def generate(pipeline):
    options = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    return pipeline({"class": "cat", "Smiling": True}, **options).images


def test_without_dit_hf_it_loads_generates_the_same_and_saves_a_folder_that_both_load(tmp_path):
    pipeline = tiny_pipeline(latents_mean=[1.0, 2.0, 3.0, 4.0])
    pipeline.save_pretrained(tmp_path / "first")
    code = f"""
import numpy, torch
from diffusers import DiffusionPipeline
first, second, images = sys.argv[1:]
for _ in range(2):
    pipe = DiffusionPipeline.from_pretrained(first, custom_pipeline="pipeline", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    generated = pipe({{"class": "cat", "Smiling": True}}, {CALL}
    pipe.save_pretrained(second)
    first, second = second, second + "-again"
numpy.save(images, generated)
assert not any(name.partition(".")[0] == "dit_hf" for name in sys.modules)
"""
    run_without_dit_hf(code, tmp_path / "first", tmp_path / "second", tmp_path / "images.npy")
    assert np.array_equal(np.load(tmp_path / "images.npy"), generate(pipeline))
    for name in ("second", "second-again"):
        loaded = DiffusionPipeline.from_pretrained(tmp_path / name)
        assert type(loaded) is LatentDiTPipeline
        assert np.array_equal(generate(loaded), generate(pipeline))
        for file in ("model_index.json", "pipeline.py"):
            assert (tmp_path / name / file).read_text() == (tmp_path / "first" / file).read_text()
    assert_no_leaks(tmp_path)


def test_its_own_code_does_not_replace_the_packages_classes(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    own = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline="pipeline", trust_remote_code=True)
    own.set_progress_bar_config(disable=True)
    assert np.array_equal(generate(own), generate(pipeline))
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is LatentDiTPipeline
