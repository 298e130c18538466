"""diffusers' features on a real tiny pipeline, as docs/diffusers.md lists them."""

import os

import pytest
import torch
from conftest import tiny_pipeline, tiny_transformer
from diffusers import (
    AutoModel,
    DiffusionPipeline,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from peft import LoraConfig
from PIL import Image

from dit_hf import (
    LatentDiTEditPipeline,
    LatentDiTImg2ImgPipeline,
    LatentDiTInpaintPipeline,
    LatentDiTPipeline,
    LatentDiTTransformer2DModel,
)
from dit_hf.models.transformer_latent_dit import LatentDiTAttnProcessor

CPU = torch.device("cpu")
ROUNDING = {"atol": 2e-6, "rtol": 0}
LORA_FILE = "pytorch_lora_weights.safetensors"


def generate(pipeline, steps=3, **options):
    pipeline.set_progress_bar_config(disable=True)
    options.setdefault("generator", torch.Generator().manual_seed(0))
    return pipeline({"Smiling": True}, num_inference_steps=steps, output_type="pt", **options).images


def lora(**options):
    torch.manual_seed(0)
    settings = {"r": 4, "init_lora_weights": False, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    return LoraConfig(**{**settings, **options})


@pytest.fixture(scope="module")
def expected():
    return generate(tiny_pipeline())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pipeline in shards, and beside them in half precision as a variant."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder, max_shard_size="50KB")
    tiny_pipeline().to(torch.float16).save_pretrained(folder, variant="fp16")
    return folder


# Loading


def test_shards_and_variants_load(folder, expected):
    assert len(list((folder / "transformer").glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 1
    assert torch.equal(generate(DiffusionPipeline.from_pretrained(folder)), expected)
    half = DiffusionPipeline.from_pretrained(folder, variant="fp16", dtype=torch.float16)
    parameters = dict(half.transformer.named_parameters())
    single = {name for name, parameter in parameters.items() if parameter.dtype == torch.float32}
    assert single == {name for name in parameters if name.startswith("time_embedding")}
    torch.testing.assert_close(generate(half).float(), expected, atol=1e-2, rtol=0)


def test_dtypes_and_device_maps(folder, expected):
    mixed = DiffusionPipeline.from_pretrained(folder, dtype={"transformer": torch.bfloat16, "default": torch.float32})
    assert (mixed.transformer.dtype, mixed.vae.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(generate(mixed), expected, atol=0.05, rtol=0)
    pipeline = DiffusionPipeline.from_pretrained(folder, device_map="cpu")
    assert torch.equal(generate(pipeline), expected)
    model = AutoModel.from_pretrained(str(folder), subfolder="transformer", device_map="auto")
    assert isinstance(model, LatentDiTTransformer2DModel)
    assert model.hf_device_map == {"": "cpu"}


def test_optional_components(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder, vae=None)
    assert pipeline.vae is None
    assert pipeline(num_inference_steps=1, output_type="latent").images.shape == (1, 4, 8, 8)


def test_from_pipe_shares_the_weights_both_ways(expected):
    pipeline = tiny_pipeline()
    for kind in (LatentDiTImg2ImgPipeline, LatentDiTInpaintPipeline, LatentDiTEditPipeline):
        other = kind.from_pipe(pipeline)
        assert other.transformer is pipeline.transformer
        back = LatentDiTPipeline.from_pipe(other)
        assert back.config.guidance_scale == 2.0
        assert back.config.condition_labels == pipeline.config.condition_labels
        torch.testing.assert_close(generate(back), expected, **ROUNDING)


# Memory


def test_layerwise_casting_stores_the_blocks_in_eight_bits(expected):
    pipeline = tiny_pipeline()
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    float32 = {name for name, p in pipeline.transformer.named_parameters() if p.dtype == torch.float32}
    assert "transformer_blocks.0.attn.to_q.weight" not in float32
    assert {name.split(".")[0] for name in float32 if "transformer_blocks" not in name} >= {
        "proj_in",
        "time_embedding",
    }
    torch.testing.assert_close(generate(pipeline), expected, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"offload_type": "block_level", "num_blocks_per_group": 1},
        {"offload_type": "leaf_level"},
        {"offload_type": "leaf_level", "offload_to_disk_path": "disk"},
    ],
)
def test_group_offloading(tmp_path, monkeypatch, expected, options):
    monkeypatch.chdir(tmp_path)
    pipeline = tiny_pipeline()
    pipeline.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, **options)
    assert torch.equal(generate(pipeline), expected)
    assert torch.equal(generate(pipeline), expected)
    if "offload_to_disk_path" in options:
        assert len(list((tmp_path / "disk").glob("*.safetensors"))) > 10


def test_offloading_of_the_whole_pipeline(expected):
    by_model, by_group = tiny_pipeline(), tiny_pipeline()
    by_model.enable_model_cpu_offload(device="cpu")
    by_group.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    by_group.vae.enable_tiling()
    for pipeline in (by_model, by_group):
        assert torch.equal(generate(pipeline), expected)


# Attention


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash"])
def test_attention_backends(expected, backend):
    pipeline = tiny_pipeline()
    try:
        pipeline.transformer.set_attention_backend(backend)
        torch.testing.assert_close(generate(pipeline), expected, **ROUNDING)
    finally:
        pipeline.transformer.set_attention_backend("native")  # diffusers keeps it for all models


def test_processors_can_be_read_and_replaced(expected):
    class Doubled(LatentDiTAttnProcessor):
        def __call__(self, attn, hidden_states, **kwargs):
            return 2 * super().__call__(attn, hidden_states, **kwargs)

    pipeline = tiny_pipeline()
    before = pipeline.transformer.attn_processors
    assert list(before) == [f"transformer_blocks.{i}.attn.processor" for i in range(2)]
    pipeline.transformer.set_attn_processor(Doubled())
    assert not torch.allclose(generate(pipeline), expected, atol=1e-3)
    pipeline.transformer.set_attn_processor(before)
    torch.testing.assert_close(generate(pipeline), expected, **ROUNDING)


def test_projections_fuse_and_unfuse(expected):
    pipeline = tiny_pipeline()
    pipeline.transformer.fuse_qkv_projections()
    torch.testing.assert_close(generate(pipeline), expected, **ROUNDING)
    pipeline.transformer.unfuse_qkv_projections()
    assert not pipeline.transformer.transformer_blocks[0].attn.fused_projections
    torch.testing.assert_close(generate(pipeline), expected, **ROUNDING)


# Adapters


def test_lora_is_added_disabled_saved_and_loaded(tmp_path, expected):
    pipeline = tiny_pipeline()
    pipeline.transformer.add_adapter(lora(), "one")
    adapted = generate(pipeline)
    assert not torch.allclose(adapted, expected, atol=1e-3)
    pipeline.transformer.disable_adapters()
    assert torch.equal(generate(pipeline), expected)
    pipeline.transformer.save_lora_adapter(tmp_path, adapter_name="one")
    assert os.listdir(tmp_path) == [LORA_FILE]
    other = tiny_pipeline()
    other.transformer.load_lora_adapter(str(tmp_path), prefix=None, weight_name=LORA_FILE, adapter_name="mine")
    assert torch.equal(generate(other), adapted)


def test_several_loras_are_weighted_fused_and_unloaded(expected):
    pipeline = tiny_pipeline()
    transformer = pipeline.transformer
    transformer.add_adapter(lora(), "one")
    transformer.add_adapter(lora(target_modules=["modulation", "ff.net.2"]), "two")
    transformer.set_adapters(["one", "two"], [0.7, 0.3])
    both = generate(pipeline)
    transformer.fuse_lora()
    torch.testing.assert_close(generate(pipeline), both, **ROUNDING)
    transformer.unfuse_lora()
    transformer.set_adapters("one")
    assert not torch.allclose(generate(pipeline), both, atol=1e-3)
    transformer.set_adapters("one", {"transformer_blocks.0": 0.0, "transformer_blocks.1": 0.0})
    torch.testing.assert_close(generate(pipeline), expected, **ROUNDING)
    transformer.unload_lora()
    assert not hasattr(transformer, "peft_config")
    torch.testing.assert_close(generate(pipeline), expected, **ROUNDING)


def test_a_lora_and_fused_projections_exclude_each_other(tmp_path):
    pipeline = tiny_pipeline()
    transformer = pipeline.transformer
    transformer.add_adapter(lora(), "smile")
    adapted = generate(pipeline)
    transformer.save_lora_adapter(tmp_path, adapter_name="smile")
    with pytest.raises(ValueError, match=r"would drop the attached adapters \(smile\)"):
        transformer.fuse_qkv_projections()
    # As the message says.
    transformer.fuse_lora()
    transformer.unload_lora()
    transformer.fuse_qkv_projections()
    torch.testing.assert_close(generate(pipeline), adapted, **ROUNDING)
    with pytest.raises(ValueError, match="no effect on fused projections"):
        transformer.add_adapter(lora(), "other")
    with pytest.raises(ValueError, match="no effect on fused projections"):
        transformer.load_lora_adapter(str(tmp_path), prefix=None, weight_name=LORA_FILE)


def test_a_lora_comes_before_layerwise_casting():
    pipeline, casting = tiny_pipeline(), {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    pipeline.transformer.add_adapter(lora())
    adapted = generate(pipeline)
    pipeline.transformer.enable_layerwise_casting(**casting)
    torch.testing.assert_close(generate(pipeline), adapted, atol=0.01, rtol=0)
    other = tiny_transformer()
    other.enable_layerwise_casting(**casting)
    with pytest.raises(ValueError, match="add adapters before enable_layerwise_casting"):
        other.add_adapter(lora())


@pytest.mark.parametrize("before", [True, False])
def test_a_lora_works_with_compiled_blocks_and_caches_in_both_orders(before):
    adapted = tiny_pipeline()
    adapted.transformer.add_adapter(lora())
    for enable in (
        lambda model: model.compile_repeated_blocks(backend="eager"),
        lambda model: model.enable_cache(FirstBlockCacheConfig(threshold=0.0)),
        lambda model: model.enable_group_offload(onload_device=CPU, offload_type="leaf_level"),
    ):
        pipeline = tiny_pipeline()
        steps = [lambda pipe: pipe.transformer.add_adapter(lora()), lambda pipe, f=enable: f(pipe.transformer)]
        for step in steps if before else steps[::-1]:
            step(pipeline)
        torch.testing.assert_close(generate(pipeline), generate(adapted), **ROUNDING)


def test_wrong_names_of_adapters_are_refused_and_change_nothing():
    pipeline = tiny_pipeline()
    transformer = pipeline.transformer
    with pytest.raises(ValueError, match="no adapter is named 'smile'; there are none"):
        transformer.set_adapters("smile")
    transformer.add_adapter(lora(), "smile")
    adapted = generate(pipeline)
    for call, message in (
        (lambda: transformer.set_adapters("smlie"), "'smlie'; there are smile"),
        (lambda: transformer.set_adapters(["smile", "smlie"], [1, 1]), "'smlie'"),
        (lambda: transformer.set_adapters("smile", {"transformer_blocks.7": 0.0}), r"'transformer_blocks\.7'"),
        (lambda: transformer.delete_adapters("smlie"), "'smlie'"),
        (lambda: transformer.fuse_lora(adapter_names=["smlie"]), "'smlie'"),
        (lambda: transformer.save_lora_adapter("nowhere", adapter_name="smlie"), "smlie"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert torch.equal(generate(pipeline), adapted)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_on_a_frozen_model(checkpointing):
    model = tiny_transformer(conditions={"Smiling": 2})
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    model.add_adapter(lora(init_lora_weights=True))
    model.train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4 * 2  # blocks, layers, matrices
    optimizer = torch.optim.AdamW(trained, 1e-2)
    noisy, target, timesteps = torch.randn(8, 4, 8, 8), torch.randn(8, 4, 8, 8), torch.arange(8.0)
    losses = []
    for _ in range(20):
        loss = (model(noisy, timesteps).sample - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.99 * losses[0]
    now = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters()}
    assert all(torch.equal(now[name], parameter) for name, parameter in frozen.items())


# Speed


CACHES = {
    "first block": FirstBlockCacheConfig(threshold=0.2),
    "taylor": TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=4, use_lite_mode=True),
    "magnitude": MagCacheConfig(num_inference_steps=20, mag_ratios=[1.0] * 20, threshold=0.2),
}


@pytest.mark.parametrize("config", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("options", [{}, {"guidance_start": 0.2, "guidance_end": 0.8}], ids=["whole", "interval"])
def test_caches_skip_blocks_and_are_reproducible(config, options):
    pipeline, calls = tiny_pipeline(), []
    pipeline.transformer.transformer_blocks[1].ff.register_forward_pre_hook(lambda *_: calls.append(1))
    full = generate(pipeline, 20, **options)
    assert len(calls) == 20
    pipeline.transformer.enable_cache(config)
    cached = generate(pipeline, 20, **options)
    assert len(calls) - 20 < 19
    torch.testing.assert_close(cached, full, atol=0.02, rtol=0)
    generate(pipeline, 2, batch_size=3)  # another shape in between
    assert torch.equal(generate(pipeline, 20, **options), cached)
    pipeline.transformer.disable_cache()
    assert torch.equal(generate(pipeline, 20, **options), full)


def test_caches_are_reset_after_an_inversion_and_an_error():
    pipeline = tiny_pipeline()
    pipeline.transformer.enable_cache(CACHES["magnitude"])
    alone = generate(pipeline, 10)
    LatentDiTEditPipeline(**pipeline.components).invert(Image.radial_gradient("L"), num_inference_steps=7)
    assert torch.equal(generate(pipeline, 10), alone)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, 10, callback_on_step_end=stop)
    assert torch.equal(generate(pipeline, 10), alone)


def test_attention_is_broadcast_over_steps():
    pipeline, calls = tiny_pipeline(), []
    full = generate(pipeline, 20)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(10, 450),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: pipeline.current_timestep,
    )
    pipeline.transformer.transformer_blocks[1].attn.to_q.register_forward_pre_hook(lambda *_: calls.append(1))
    pipeline.transformer.enable_cache(config)
    torch.testing.assert_close(generate(pipeline, 20), full, atol=0.02, rtol=0)
    assert len(calls) < 15
    assert pipeline.current_timestep is None


def test_layers_can_be_skipped(expected):
    pipeline = tiny_pipeline()
    apply_layer_skip(pipeline.transformer, LayerSkipConfig(indices=[1], fqn="transformer_blocks"))
    shorter = tiny_pipeline()
    del shorter.transformer.transformer_blocks[1]
    torch.testing.assert_close(generate(pipeline), generate(shorter), **ROUNDING)


def test_repeated_blocks_compile(expected):
    pipeline = tiny_pipeline()
    pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(generate(pipeline), expected, **ROUNDING)


# Callbacks


def test_a_callback_interrupts():
    seen = []

    def callback(pipeline, step, _timestep, tensors):
        seen.append(step)
        pipeline._interrupt = step == 1
        return tensors

    pipeline = tiny_pipeline()
    generate(pipeline, 5, callback_on_step_end=callback)
    assert seen == [0, 1]
    assert pipeline.interrupt
    generate(pipeline, 3)  # the next call runs again
    assert not pipeline.interrupt
