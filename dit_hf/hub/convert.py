"""`dit-hf convert`: DiTs of other makers as pipelines of ours."""

from __future__ import annotations

import argparse
import math
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from diffusers import DiffusionPipeline, DiTPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..config import PRESETS
from ..latents.vae import load_vae
from ..models.transformer_latent_dit import LatentDiTTransformer2DModel
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..schedulers.scheduling_cosine_latent import CosineLatentScheduler
from ..storage import disk_errors, first_line, is_missing_or_empty, new_folder

GUIDANCE_SCALE = 4.0  # what both sample with unless told

# Names of facebookresearch/DiT and of diffusers for ours; in `{}` is the number of the block.
FACEBOOKRESEARCH = {
    "proj_in": "x_embedder.proj",
    "time_embedding.linear_1": "t_embedder.mlp.0",
    "time_embedding.linear_2": "t_embedder.mlp.2",
    "condition_embedding": "y_embedder.embedding_table",
    "transformer_blocks.{}.modulation": "blocks.{}.adaLN_modulation.1",
    "transformer_blocks.{}.attn.to_out.0": "blocks.{}.attn.proj",
    "transformer_blocks.{}.ff.net.0.proj": "blocks.{}.mlp.fc1",
    "transformer_blocks.{}.ff.net.2": "blocks.{}.mlp.fc2",
    "modulation_out": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
DIFFUSERS = {
    "proj_in": "pos_embed.proj",
    "transformer_blocks.{}.modulation": "transformer_blocks.{}.norm1.linear",
    "transformer_blocks.{}.attn.to_q": "transformer_blocks.{}.attn1.to_q",
    "transformer_blocks.{}.attn.to_k": "transformer_blocks.{}.attn1.to_k",
    "transformer_blocks.{}.attn.to_v": "transformer_blocks.{}.attn1.to_v",
    "transformer_blocks.{}.attn.to_out.0": "transformer_blocks.{}.attn1.to_out.0",
    "transformer_blocks.{}.ff.net.0.proj": "transformer_blocks.{}.ff.net.0.proj",
    "transformer_blocks.{}.ff.net.2": "transformer_blocks.{}.ff.net.2",
    "modulation_out": "proj_out_1",
    "proj_out": "proj_out_2",
}
# Of these diffusers has one in every block.
DIFFUSERS_EMBEDDER = {
    "time_embedding.linear_1": "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1",
    "time_embedding.linear_2": "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_2",
    "condition_embedding": "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table",
}


def convert(
    source: str, output_dir: str, vae: str = "stabilityai/sd-vae-ft-ema", num_attention_heads: int | None = None
) -> None:
    """Make a pipeline of a facebookresearch/DiT checkpoint (a file) or a diffusers DiT pipeline (a folder or Hub id).

    It is sampled with the noise levels it was trained on. Of a checkpoint the averaged weights are taken; a learned
    sigma stays in the model and is not used. Guidance leads all channels, where facebookresearch/DiT leads three.

    Args:
        source: `DiT-XL-2-256x256.pt`, a checkpoint of that code's training, or e.g. `facebook/DiT-XL-2-256`.
        output_dir: the pipeline's folder.
        vae: of a checkpoint, which has none: a Hub id, a folder, or `avatar`.
        num_attention_heads: of a checkpoint whose width is none of the paper's.

    Raises:
        FileExistsError: if the folder is not empty.
        ValueError: if the source is no such model.
        OSError: if the folder cannot be written or the disk is full.
    """
    folder = Path(output_dir)
    if not is_missing_or_empty(folder):
        raise FileExistsError(f"output_dir {folder} is not empty; name a new folder")
    if Path(source).is_file():
        pipeline = from_checkpoint(Path(source), vae, num_attention_heads)
    else:
        pipeline = from_diffusers(source)
    with disk_errors(f"output_dir {folder}"), new_folder(folder) as partial:
        pipeline.save_pretrained(partial)
    parameters = sum(p.numel() for p in pipeline.transformer.parameters())
    print(f"{folder} is the pipeline: {parameters:,} parameters, {pipeline.transformer.config.conditions}", flush=True)


def from_checkpoint(path: Path, vae: str, num_attention_heads: int | None = None) -> LatentDiTPipeline:
    """The pipeline of a checkpoint of facebookresearch/DiT; see `convert`.

    Raises:
        ValueError: if it is none.
    """
    weights = _read_checkpoint(path)
    missing = {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed"} - set(weights)
    if missing:
        raise ValueError(f"{path} is no checkpoint of facebookresearch/DiT: it has no {', '.join(sorted(missing))}")
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    known = {s["num_attention_heads"] * s["attention_head_dim"]: s["num_attention_heads"] for s in _paper_sizes()}
    heads = num_attention_heads or known.get(width)
    if heads is None or width % heads:
        raise ValueError(f"{path} has width {width}; give --num_attention_heads, which its weights do not tell")
    transformer = LatentDiTTransformer2DModel(
        sample_size=math.isqrt(weights["pos_embed"].shape[1]) * patch,
        patch_size=patch,
        in_channels=channels,
        out_channels=weights["final_layer.linear.weight"].shape[0] // patch**2,
        num_layers=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        conditions={"class": len(weights["y_embedder.embedding_table.weight"]) - 1},
    )
    positions = transformer._positions(*(math.isqrt(weights["pos_embed"].shape[1]),) * 2, weights["pos_embed"])
    if not torch.allclose(positions, weights["pos_embed"][0], atol=1e-4):
        raise ValueError(f"{path} has other positions than facebookresearch/DiT's")
    for i in range(transformer.config.num_layers):
        for kind in ("weight", "bias"):
            parts = weights.pop(f"blocks.{i}.attn.qkv.{kind}").chunk(3)
            weights |= {f"blocks.{i}.attn.{name}.{kind}": part for name, part in zip("qkv", parts, strict=True)}
    split = {f"transformer_blocks.{{}}.attn.to_{name}": f"blocks.{{}}.attn.{name}" for name in "qkv"}
    load_renamed(transformer, weights, FACEBOOKRESEARCH | split, str(path))
    # Ho et al.'s linear schedule (https://arxiv.org/abs/2006.11239), which DiT is trained with.
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist()
    scheduler = CosineLatentScheduler(1000, prediction_type="epsilon", trained_betas=betas)
    return LatentDiTPipeline(transformer.eval(), scheduler, load_vae(vae, "cpu"), guidance_scale=GUIDANCE_SCALE)


def from_diffusers(source: str) -> LatentDiTPipeline:
    """The pipeline of one of diffusers' DiT pipelines; see `convert`.

    Raises:
        ValueError: if it is none, or one that ours cannot be.
    """
    try:
        other = DiffusionPipeline.from_pretrained(source)
        labels = DiffusionPipeline.load_config(source).get("id2label") or {}
    except Exception as error:  # no such folder, no network, a damaged file: each raises its own
        reason = first_line(error)
        raise ValueError(f"{source}: no file, and no pipeline could be loaded from there ({reason})") from error
    if not isinstance(other, DiTPipeline):
        raise ValueError(f"{source}: {type(other).__name__} is no DiTPipeline")
    config, weights = other.transformer.config, other.transformer.state_dict()
    fixed = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False}
    for name, value in fixed.items():
        if config[name] != value:
            raise ValueError(f"{source}: its transformer has {name}={config[name]!r}, ours has {value!r}")
    for pattern in DIFFUSERS_EMBEDDER.values():
        same = [tensor for name, tensor in weights.items() if _matches(name, pattern)]
        count = len(same) // config.num_layers
        if any(not torch.equal(tensor, same[i % count]) for i, tensor in enumerate(same)):
            raise ValueError(f"{source}: {pattern.partition('norm1.')[2]} differs from block to block; ours has one")
    transformer = LatentDiTTransformer2DModel(
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        conditions={"class": config.num_embeds_ada_norm},
        timestep_freq_shift=1.0,
    )
    first = {name: pattern.format(0) for name, pattern in DIFFUSERS_EMBEDDER.items()}
    load_renamed(transformer, weights, DIFFUSERS | first, source)
    schedule = other.scheduler
    scheduler = CosineLatentScheduler(
        len(schedule.betas),
        prediction_type=schedule.config.prediction_type,
        trained_betas=schedule.betas.double().tolist(),
    )
    names = [labels.get(str(i), labels.get(i)) for i in range(config.num_embeds_ada_norm)]
    options: dict[str, Any] = {} if None in names else {"condition_labels": {"class": names}}
    return LatentDiTPipeline(transformer.eval(), scheduler, other.vae, guidance_scale=GUIDANCE_SCALE, **options)


def load_renamed(
    transformer: LatentDiTTransformer2DModel, weights: dict[str, torch.Tensor], names: dict[str, str], source: str
) -> None:
    """Give the transformer the weights that `names` calls otherwise.

    Raises:
        ValueError: if one is missing or has another shape.
    """
    renamed = {}
    for name, tensor in transformer.state_dict().items():
        other = theirs(name, names)
        if other not in weights or weights[other].numel() != tensor.numel():
            raise ValueError(f"{source}: {other} is not there, or not {tuple(tensor.shape)}")
        renamed[name] = weights[other].reshape(tensor.shape).float()
    transformer.load_state_dict(renamed)


def theirs(name: str, names: dict[str, str]) -> str:
    """What a weight of ours is called elsewhere."""
    module, _, kind = name.rpartition(".")
    parts = module.split(".")
    block = parts[1] if parts[0] == "transformer_blocks" else ""
    pattern = ".".join(["transformer_blocks", "{}", *parts[2:]]) if block else module
    return f"{names[pattern].format(block)}.{kind}"


def _paper_sizes() -> list[dict[str, int]]:
    return [sizes for name, sizes in PRESETS.items() if name.endswith("/2")]


def _matches(name: str, pattern: str) -> bool:
    before, _, after = pattern.partition("{}")
    return name.startswith(before) and after + "." in name


def _read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a file, averaged ones if there are; nothing but tensors and plain values is unpickled."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        reason = first_line(error)
        raise ValueError(f"{path}: no weights can be read from there ({reason})") from error
    weights: Any = content.get("ema", content.get("model", content)) if isinstance(content, dict) else {}
    return {name: tensor for name, tensor in weights.items() if isinstance(tensor, torch.Tensor)}
