"""The code in a saved pipeline, which loads without dit_hf."""

import diffusers
import numpy as np
import pytest
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


# What diffusers 0.35 has otherwise, as far as a pipeline meets it: it reads no string and no `X | None` as a type,
# has no `parameters` and no modular pipelines like today's, passes no `parallel_config`, and takes lines for imports
# wherever they stand.
AS_IN_0_35 = """
import inspect, re, typing
from diffusers import DiffusionPipeline
from diffusers.models import attention_dispatch
from diffusers.utils import dynamic_modules_utils

def signature_types(cls):
    types = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        kind = parameter.annotation
        if inspect.isclass(kind):
            types[name] = (kind,)
        elif typing.get_origin(kind) == typing.Union:
            types[name] = typing.get_args(kind)
        elif typing.get_origin(kind) in (list, dict):
            types[name] = (kind,)
    return types

dispatch = attention_dispatch.dispatch_attention_fn
def dispatch_attention_fn(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                          enable_gqa=False, attention_kwargs=None, *, backend=None):
    return dispatch(query, key, value, backend=backend)

def check_imports(filename):
    content = open(filename, encoding="utf-8").read()
    names = re.findall(r"^\\s*import\\s+(\\S+)\\s*$", content, re.M)
    names += re.findall(r"^\\s*from\\s+(\\S+)\\s+import", content, re.M)
    for name in {name.partition(".")[0] for name in names if not name.startswith(".")}:
        __import__(name)
    return dynamic_modules_utils.get_relative_imports(filename)

DiffusionPipeline._get_signature_types = classmethod(signature_types)
del DiffusionPipeline.parameters
sys.modules["diffusers.modular_pipelines.modular_pipeline"] = None  # which fails to be imported
attention_dispatch.dispatch_attention_fn = dispatch_attention_fn
dynamic_modules_utils.check_imports = check_imports
"""


@pytest.mark.slow  # `make test-versions` does the same with diffusers 0.35 itself
def test_diffusers_0_35_loads_it_too(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "first")
    code = f"""{AS_IN_0_35}
import numpy, torch
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline="pipeline", trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
numpy.save(sys.argv[3], pipe({{"class": "cat", "Smiling": True}}, {CALL})
assert pipe.components.keys() >= {{"transformer", "latents_mean", "guidance_scale"}}
pipe.save_pretrained(sys.argv[2])
"""
    run_without_dit_hf(code, tmp_path / "first", tmp_path / "second", tmp_path / "images.npy")
    assert np.array_equal(np.load(tmp_path / "images.npy"), generate(pipeline))
    assert np.array_equal(generate(DiffusionPipeline.from_pretrained(tmp_path / "second")), generate(pipeline))


def test_an_older_diffusers_gets_one_line_with_both_versions(tmp_path, monkeypatch):
    tiny_pipeline().save_pretrained(tmp_path)
    monkeypatch.setattr(diffusers, "__version__", "0.34.0")
    with pytest.raises(ImportError) as error:
        DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline="pipeline", trust_remote_code=True)
    assert str(error.value) == (
        "this pipeline needs diffusers 0.35.0 or newer, and 0.34.0 is installed: pip install -U diffusers"
    )
