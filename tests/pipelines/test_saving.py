"""Saving touches nothing that is not ours, and what is saved or pushed loads again."""

import json

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import tiny_pipeline, tiny_transformer
from diffusers import DiffusionPipeline
from peft import LoraConfig
from pipeline_calls import run
from repositories import run_without_dit_hf

from dit_hf import CosineLatentScheduler, LatentDiTPipeline, LatentDiTTransformer2DModel


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bert/config.json", '{"_name_or_path": "x/y", "a": 1}'),
        ("web/tsconfig.json", "{ // comment\n}"),
        ("notes/config.json", ""),
        ("transformer/tsconfig.json", "{ // comment\n}"),
        ("README.md", "mine"),
    ],
)
def test_other_files_keep_their_bytes(tmp_path, name, text):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    tiny_pipeline().save_pretrained(tmp_path)
    assert path.read_text() == text
    assert np.array_equal(run(DiffusionPipeline.from_pretrained(tmp_path)), run(tiny_pipeline()))


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("pipeline.py", "print('mine')\n", {}),
        ("model_index.json", '{"_class_name": "StableDiffusionPipeline"}', {}),
        ("modular_config.json", '{"_class_name": "FluxAutoBlocks"}', {}),
        ("README.md", "mine", {"push_to_hub": True}),
    ],
)
def test_a_folder_of_something_else_is_refused_before_anything_is_written(tmp_path, name, text, options):
    (tmp_path / name).write_text(text)
    with pytest.raises(FileExistsError, match="name a new folder"):
        tiny_pipeline().save_pretrained(tmp_path, **options)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, text)]


def test_a_pipeline_is_saved_over_itself(tmp_path):
    for _ in range(2):
        tiny_pipeline().save_pretrained(tmp_path)
    assert np.array_equal(run(DiffusionPipeline.from_pretrained(tmp_path)), run(tiny_pipeline()))


@pytest.mark.parametrize("merged", [False, True])
def test_attached_adapters_are_not_saved_as_a_model(tmp_path, merged):
    pipeline = tiny_pipeline()
    base = run(pipeline)
    torch.manual_seed(0)
    pipeline.transformer.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q"]), "smile")
    adapted = run(pipeline)
    if merged:
        pipeline.transformer.fuse_lora()
    for save in (pipeline.save_pretrained, pipeline.transformer.save_pretrained):
        with pytest.raises(ValueError, match=r"adapters are attached \(smile\).*unload_lora"):
            save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    # As the message says.
    pipeline.transformer.unload_lora()
    pipeline.save_pretrained(tmp_path / "model")
    expected = adapted if merged else base
    np.testing.assert_allclose(run(DiffusionPipeline.from_pretrained(tmp_path / "model")), expected, atol=1e-5)


def test_layers_of_fewer_bits_are_not_saved(tmp_path):
    model = tiny_transformer()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"save the model before enable_layerwise_casting"):
        model.save_pretrained(tmp_path)


# The Hub.


@pytest.fixture
def pushing_hub(hub, monkeypatch):
    """The local Hub, also for diffusers' `create_repo`, which belongs to an object that is made at import."""
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
    return hub


def test_a_pushed_pipeline_loads_by_the_package_and_by_its_own_code(pushing_hub, tmp_path):
    pipeline = tiny_pipeline()
    expected = run(pipeline, {"class": "cat"})
    pipeline.push_to_hub("you/faces")
    pipeline.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="you/again")
    for name in ("you/faces", "you/again"):
        files = pushing_hub.repositories[name]
        assert {"model_index.json", "modular_config.json", "pipeline.py", "README.md"} < set(files)
        card = files["README.md"].decode()
        assert f'from_pretrained("{name}", custom_pipeline="pipeline"' in card
        assert "More Information Needed" not in card
        for options in ({}, {"custom_pipeline": "pipeline", "trust_remote_code": True}):
            loaded = DiffusionPipeline.from_pretrained(name, **options)
            assert np.array_equal(run(loaded, {"class": "cat"}), expected)


def test_a_card_that_is_there_is_kept(pushing_hub):
    pipeline = tiny_pipeline()
    pipeline.push_to_hub("you/faces")
    pushing_hub.repositories["you/faces"]["README.md"] = b"---\nlibrary_name: diffusers\n---\nmine"
    pipeline.push_to_hub("you/faces")
    assert b"mine" in pushing_hub.repositories["you/faces"]["README.md"]


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # diffusers passes it
def test_parts_are_pushed_too(pushing_hub):
    pipeline = tiny_pipeline()
    pipeline.transformer.push_to_hub("you/parts", subfolder="transformer")
    pipeline.scheduler.push_to_hub("you/parts", subfolder="scheduler")
    model = LatentDiTTransformer2DModel.from_pretrained("you/parts", subfolder="transformer")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), pipeline.transformer.parameters(), strict=True))
    scheduler = CosineLatentScheduler.from_pretrained("you/parts", subfolder="scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    config = json.loads(pushing_hub.repositories["you/parts"]["transformer/config.json"])
    assert config["conditions"] == {"Smiling": 2, "class": 3}


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # diffusers passes it
def test_a_part_alone_has_a_card_whose_code_loads_it(pushing_hub, tmp_path):
    pipeline = tiny_pipeline()
    pipeline.transformer.push_to_hub("you/transformer")
    pipeline.transformer.save_pretrained(str(tmp_path / "again"), push_to_hub=True, repo_id="you/again")
    pipeline.scheduler.push_to_hub("you/scheduler")
    for name in ("transformer", "again", "scheduler"):
        card = pushing_hub.repositories[f"you/{name}"]["README.md"].decode()
        assert "More Information Needed" not in card
        loaded: dict = {}
        exec(card.split("```python\n")[1].split("```")[0], loaded)
        part = "scheduler" if name == "scheduler" else "transformer"
        assert dict(loaded[part].config)["prediction_type" if part == "scheduler" else "num_layers"] in (
            "v_prediction",
            2,
        )


# Loading.


def test_the_folder_of_a_run_names_its_pipeline(model):
    with pytest.raises(OSError, match=rf"{model} is the folder of a run: its pipeline is in {model}/pipeline$"):
        LatentDiTPipeline.from_pretrained(model)
    assert type(LatentDiTPipeline.from_pretrained(f"{model}/pipeline")) is LatentDiTPipeline


@pytest.fixture
def two_revisions(hub, tmp_path):
    """The local Hub with `you/faces`, in shards of a variant; at revision v1 it generates what is returned."""
    for seed, name in ((1, "you/faces"), (0, "you/faces@v1")):
        pipeline = tiny_pipeline()
        pipeline.transformer = tiny_transformer(
            seed, conditions={"Smiling": 2, "class": 3}, use_rotary_positional_embeddings=True
        )
        folder = tmp_path / str(seed)
        pipeline.save_pretrained(folder, variant="fp16", max_shard_size="50KB")
        files = [path for path in folder.rglob("*") if path.is_file()]
        hub.repositories[name] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    assert any(path.endswith("fp16-00002-of-00003.safetensors") for path in hub.repositories["you/faces@v1"])
    local = LatentDiTPipeline.from_pretrained(folder, variant="fp16", dtype=torch.bfloat16)
    assert not np.allclose(run(local), run(LatentDiTPipeline.from_pretrained(tmp_path / "1", variant="fp16")))
    return hub, latents_of(local)


def latents_of(pipeline):
    return run(pipeline, {"class": "cat"}, output_type="latent").float().numpy()


OPTIONS = {"variant": "fp16", "revision": "v1", "device_map": "cpu"}


def test_a_pinned_revision_in_shards_of_a_variant_loads_by_name_and_from_the_cache(two_revisions, monkeypatch):
    hub, expected = two_revisions
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        hub.requests.clear()
        loaded = DiffusionPipeline.from_pretrained("you/faces", dtype=torch.bfloat16, **OPTIONS)
        assert bool(hub.requests) != offline
        assert loaded.transformer.dtype == torch.bfloat16
        assert np.array_equal(latents_of(loaded), expected)


@pytest.mark.slow
def test_it_does_so_by_its_own_code_too(two_revisions, tmp_path):
    hub, expected = two_revisions
    code = f"""
import numpy, torch
from diffusers import DiffusionPipeline, ModularPipeline
from huggingface_hub import constants, snapshot_download
faces = "you/faces"
if constants.HF_HUB_OFFLINE:  # diffusers asks the Hub which code is the newest, but not of a folder
    faces = snapshot_download(faces, revision="v1")
options = {OPTIONS!r} | {{"dtype": torch.bfloat16}}
call = {{"num_inference_steps": 3, "output_type": "latent"}}
pipe = DiffusionPipeline.from_pretrained(faces, custom_pipeline="pipeline", trust_remote_code=True, **options)
images = pipe({{"class": "cat"}}, generator=torch.Generator().manual_seed(0), **call).images
pipe = ModularPipeline.from_pretrained(faces, revision="v1", trust_remote_code=True)
pipe.load_components(**options)
call["attributes"] = {{"class": "cat"}}
again = pipe(generator=torch.Generator().manual_seed(0), **call, output="images")
numpy.save(sys.argv[1], torch.stack([images, again]).float().numpy())
"""
    for offline in "01":
        environment = hub.environment() | {"HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path / "home")}
        run_without_dit_hf(code, tmp_path / "latents.npy", **environment)
        for latents in np.load(tmp_path / "latents.npy"):
            assert np.array_equal(latents, expected)
