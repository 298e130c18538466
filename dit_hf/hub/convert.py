"""`dit-hf convert`: turn DiTs of facebookresearch/DiT and diffusers into pipelines of dit_hf."""

from __future__ import annotations

import argparse
import math
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, DiTPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..config import PRESETS
from ..hub_ids import is_hub_id, reading_problem, split_revision
from ..latents.vae import load_vae
from ..models.transformer_latent_dit import LatentDiTTransformer2DModel
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..runs import CONFIG
from ..schedulers.scheduling_cosine_latent import CosineLatentScheduler, named_betas
from ..storage import disk_errors, first_line, folder_taken, is_missing_or_empty, locked_beside, new_folder

PredictionType = Literal["epsilon", "sample", "v_prediction"]
BetaSchedule = Literal["linear", "squaredcos_cap_v2"]
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SIT = "SiT predicts the velocity of a linear path, which no scheduler of this package has"
GUIDANCE_SCALE = 4.0  # the default of both

# Our names of modules to those of facebookresearch/DiT and of diffusers; `{}` is the number of the block.
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
# Modules of which diffusers has a copy in every block.
DIFFUSERS_EMBEDDER = {
    "time_embedding.linear_1": "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1",
    "time_embedding.linear_2": "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_2",
    "condition_embedding": "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table",
}


def convert(
    source: str,
    output_dir: str,
    vae: str = "stabilityai/sd-vae-ft-ema",
    num_attention_heads: int | None = None,
    num_classes: int | None = None,
    prediction_type: PredictionType = "epsilon",
    beta_schedule: BetaSchedule = "linear",
) -> None:
    """Convert a facebookresearch/DiT checkpoint (a file) or a diffusers DiT pipeline (a folder or Hub id).

    The pipeline samples with the noise levels that the model was trained on. Of a checkpoint the EMA weights are
    converted; a learned sigma stays in the model and is not used. Guidance applies to all latent channels, where
    facebookresearch/DiT applies it to three.

    Args:
        source: `DiT-XL-2-256x256.pt`, a checkpoint of that code's training, or e.g. `facebook/DiT-XL-2-256`.
        output_dir: the pipeline's folder.
        vae: for a checkpoint, which contains none: a Hub id, a folder, or `avatar`.
        num_attention_heads: for a checkpoint whose width is not one of the paper's.
        num_classes: for a checkpoint: the rows of its table of classes, or one less, by default. The last row is the
            unconditional one, unless it was trained without label dropout.
        prediction_type: for a checkpoint: what it predicts, `epsilon`, `sample` or `v_prediction`.
        beta_schedule: for a checkpoint: its 1,000 noise levels, `linear` or `squaredcos_cap_v2`.

    Raises:
        FileExistsError: if the folder is not empty.
        ValueError: if the source is not such a model.
        OSError: if the folder cannot be written or the disk is full.
    """
    folder = Path(output_dir)
    place = f"output_dir {folder}"
    with disk_errors(place), locked_beside(folder):
        if not is_missing_or_empty(folder):
            raise FileExistsError(folder_taken(place, "is not empty"))
        if Path(source).is_file():
            objective: tuple[PredictionType, BetaSchedule] = (prediction_type, beta_schedule)
            pipeline = from_checkpoint(Path(source), vae, num_attention_heads, num_classes, *objective)
        else:
            pipeline = from_diffusers(source)
        with new_folder(folder) as partial:
            pipeline.save_pretrained(partial)
    parameters = sum(p.numel() for p in pipeline.transformer.parameters())
    print(f"{folder} is the pipeline: {parameters:,} parameters, {pipeline.transformer.config.conditions}", flush=True)


def from_checkpoint(
    path: Path,
    vae: str,
    num_attention_heads: int | None = None,
    num_classes: int | None = None,
    prediction_type: PredictionType = "epsilon",
    beta_schedule: BetaSchedule = "linear",
) -> LatentDiTPipeline:
    """Build the pipeline of a facebookresearch/DiT checkpoint; see `convert`.

    Raises:
        ValueError: if the file is not such a checkpoint.
    """
    weights = _read_checkpoint(path)
    if path.name.startswith("SiT"):
        raise ValueError(f"{path}: {_SIT}")
    missing = {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed"} - set(weights)
    if missing:
        raise ValueError(f"{path} is not a checkpoint of facebookresearch/DiT: it has no {', '.join(sorted(missing))}")
    _check_shapes(path, weights)

    rows = len(weights["y_embedder.embedding_table.weight"])

    # Every size can be read off the weights' shapes, except for the number of heads.
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    grid = math.isqrt(weights["pos_embed"].shape[1])
    heads_by_width = {
        s["num_attention_heads"] * s["attention_head_dim"]: s["num_attention_heads"] for s in _paper_sizes()
    }
    heads = num_attention_heads or heads_by_width.get(width)
    if heads is None or width % heads:
        raise ValueError(f"{path} has width {width}; give --num_attention_heads, which the weights do not contain")
    transformer = LatentDiTTransformer2DModel(
        sample_size=grid * patch,
        patch_size=patch,
        in_channels=channels,
        out_channels=weights["final_layer.linear.weight"].shape[0] // patch**2,
        num_layers=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        conditions={"class": _add_null_row(path, weights, num_classes)},
    )

    # Ours are computed, theirs are stored: with other positions the pipeline would silently generate noise.
    positions = transformer._positions(grid, grid, weights["pos_embed"].float())  # [tokens, dim]
    if not torch.allclose(positions, weights.pop("pos_embed")[0].float(), atol=1e-4):
        raise ValueError(f"{path} has other positions than facebookresearch/DiT's")

    # Split the joint projection of queries, keys and values.
    for i in range(transformer.config.num_layers):
        for kind in ("weight", "bias"):
            parts = weights.pop(f"blocks.{i}.attn.qkv.{kind}").chunk(3)
            weights |= {f"blocks.{i}.attn.{name}.{kind}": part for name, part in zip("qkv", parts, strict=True)}
    projections = {f"transformer_blocks.{{}}.attn.to_{name}": f"blocks.{{}}.attn.{name}" for name in "qkv"}
    load_renamed(transformer, weights, FACEBOOKRESEARCH | projections, str(path))

    # The weights tell neither the levels of noise nor what they predict. DiT is trained with the linear ones.
    betas = named_betas(beta_schedule, 1000)
    scheduler = CosineLatentScheduler(1000, prediction_type=prediction_type, trained_betas=betas)
    objective = f"--prediction_type {prediction_type} and --beta_schedule {beta_schedule} (1,000 levels)"
    print(f"{path.name}: {objective}, which its weights do not tell")
    guidance_scale = 1.0 if num_classes == transformer.config.conditions["class"] == rows else GUIDANCE_SCALE
    return LatentDiTPipeline(transformer.eval(), scheduler, load_vae(vae, "cpu"), guidance_scale=guidance_scale)


def _check_shapes(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Refuse weights whose shapes are not those of a facebookresearch/DiT.

    Raises:
        ValueError: naming the weight.
    """
    for name, dimensions in (
        ("x_embedder.proj.weight", 4),
        ("pos_embed", 3),
        ("y_embedder.embedding_table.weight", 2),
    ):
        if weights[name].ndim != dimensions:
            shape = list(weights[name].shape)
            raise ValueError(f"{path}: {name} has the shape {shape}; expected {dimensions} dimensions")
    count, tokens, width = weights["pos_embed"].shape
    if (
        count != 1
        or not tokens
        or math.isqrt(tokens) ** 2 != tokens
        or width != len(weights["x_embedder.proj.weight"])
    ):
        shape = list(weights["pos_embed"].shape)
        raise ValueError(f"{path}: pos_embed has the shape {shape}; expected a square of tokens of the model's width")
    blocks = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    qkv = [f"blocks.{block}.attn.qkv.{kind}" for block in range(blocks) for kind in ("weight", "bias")]
    for name in ("final_layer.linear.weight", "blocks.0.mlp.fc1.weight", *qkv):
        if name not in weights:
            raise ValueError(f"{path} is not a checkpoint of facebookresearch/DiT: it has no {name}")
    for name, tensor in weights.items():
        if not tensor.ndim or not tensor.numel():
            raise ValueError(f"{path}: {name} has the shape {list(tensor.shape)}; expected rows of numbers")


def _add_null_row(path: Path, weights: dict[str, torch.Tensor], num_classes: int | None) -> int:
    """Return the number of classes of a checkpoint, whose table then has one row more, the unconditional one.

    Raises:
        ValueError: if the table cannot have so many classes.
    """
    name = "y_embedder.embedding_table.weight"
    rows = len(weights[name])
    classes = rows - 1 if num_classes is None else num_classes
    if classes not in (rows - 1, rows) or classes < 1:
        raise ValueError(f"{path}: {name} has {rows} rows; expected --num_classes {rows - 1} or {rows}, got {classes}")
    if classes == rows:
        # Trained without label dropout. The mean of the classes stands for none of them; there is no guidance.
        weights[name] = torch.cat([weights[name], weights[name].float().mean(0, keepdim=True).to(weights[name])])
        print(f"{path.name}: {rows} classes and no unconditional row; guidance is off, its mean class stands for none")
    else:
        print(
            f"{path.name}: {classes} classes, and row {classes} of {name} is taken for the unconditional one; if it "
            f"was trained without label dropout, give --num_classes {rows}"
        )
    return classes


def from_diffusers(source: str) -> LatentDiTPipeline:
    """Build the pipeline of a diffusers `DiTPipeline`; see `convert`.

    Raises:
        ValueError: if it is not one, or has parts that our transformer lacks.
    """
    # On the Hub a model is OWNER/NAME; anything else is not asked for there.
    (repo_id, revision), is_path = split_revision(source), Path(source).exists()
    if not is_path and (not is_hub_id(repo_id) or Path(source).suffix in (".pt", ".safetensors")):
        raise ValueError(f"{source}: no such file or folder; a pipeline on the Hub is OWNER/NAME")
    problem = None if is_path else reading_problem(repo_id, revision, "model_index.json")
    try:
        place = {"revision": revision, "local_files_only": problem is not None}
        other = DiffusionPipeline.from_pretrained(repo_id, **place)
        labels = DiffusionPipeline.load_config(repo_id, **place).get("id2label") or {}
    except Exception as error:  # no such folder, no network, a damaged file: each has its own exception
        if problem:
            raise ValueError(f"{source}: {problem}") from error
        if (Path(source) / CONFIG).is_file():
            raise ValueError(f"{source} is a run of dit_hf already, not a DiT of another project") from error
        if Path(source).is_dir():
            raise ValueError(f"{source}: a folder without model_index.json, which a diffusers pipeline has") from error
        reason = first_line(error)
        raise ValueError(f"{source}: not a file, and no pipeline could be loaded from there ({reason})") from error
    if not isinstance(other, DiTPipeline):
        raise ValueError(f"{source}: expected a DiTPipeline, got {type(other).__name__}")
    config, weights = other.transformer.config, other.transformer.state_dict()
    _check_convertible(source, config, weights)

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
    first_block = {name: pattern.format(0) for name, pattern in DIFFUSERS_EMBEDDER.items()}
    # Every block has the same embedders, as was checked.
    copies = [pattern.format(i) for pattern in DIFFUSERS_EMBEDDER.values() for i in range(1, config.num_layers)]
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(tuple(copies))}
    load_renamed(transformer, weights, DIFFUSERS | first_block, source)

    # The schedule as a table, whatever formula it came from.
    schedule = other.scheduler
    scheduler = CosineLatentScheduler(
        len(schedule.betas),
        prediction_type=schedule.config.prediction_type,
        trained_betas=schedule.betas.double().tolist(),
    )
    # Keys of the labels are strings in JSON and numbers in a pipeline that was not saved.
    names = [labels.get(str(i), labels.get(i)) for i in range(config.num_embeds_ada_norm)]
    options: dict[str, Any] = {} if None in names else {"condition_labels": {"class": names}}
    return LatentDiTPipeline(transformer.eval(), scheduler, other.vae, guidance_scale=GUIDANCE_SCALE, **options)


def _check_convertible(source: str, config: Any, weights: dict[str, torch.Tensor]) -> None:
    """Refuse a diffusers transformer with options that ours lacks, or with embedders that differ between blocks."""
    fixed_options = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False}
    for name, value in fixed_options.items():
        if config[name] != value:
            raise ValueError(f"{source}: expected a transformer with {name}={value!r}, got {config[name]!r}")
    for pattern in DIFFUSERS_EMBEDDER.values():
        # Weights come block by block, each with the same `count` tensors.
        tensors = [tensor for name, tensor in weights.items() if _matches(name, pattern)]
        count = len(tensors) // config.num_layers
        if any(not torch.equal(tensor, tensors[i % count]) for i, tensor in enumerate(tensors)):
            raise ValueError(f"{source}: {pattern.partition('norm1.')[2]} differs from block to block; ours has one")


def load_renamed(
    transformer: LatentDiTTransformer2DModel, weights: dict[str, torch.Tensor], names: dict[str, str], source: str
) -> None:
    """Load weights under other names into `transformer`.

    Args:
        transformer: Gets the weights, as float32.
        weights: State dict under the other names.
        names: Our names of modules to the other ones; see `FACEBOOKRESEARCH`.
        source: Name of the model, for errors.

    Raises:
        ValueError: if one is missing, has another size or values that are not finite, or has no place.
    """
    bad = [name for name, tensor in weights.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f"{source}: {bad[0]} has values that are not finite; so have {len(bad) - 1} others")
    renamed, used = {}, set()
    for name, tensor in transformer.state_dict().items():
        other = translate_name(name, names)
        if other not in weights or weights[other].numel() != tensor.numel():
            raise ValueError(f"{source}: {other} is missing or does not have the shape {tuple(tensor.shape)}")
        used.add(other)
        # A linear layer here may be a convolution there.
        renamed[name] = weights[other].reshape(tensor.shape).float()
    unused = sorted(weights.keys() - used)
    if unused:
        raise ValueError(f"{source}: {len(unused)} weights have no place in this model, e.g. {', '.join(unused[:3])}")
    transformer.load_state_dict(renamed)


def translate_name(name: str, names: dict[str, str]) -> str:
    """Return the other name of one of our weights, e.g. `blocks.3.mlp.fc1.bias`; see `FACEBOOKRESEARCH`."""
    module, _, kind = name.rpartition(".")
    parts = module.split(".")
    block = parts[1] if parts[0] == "transformer_blocks" else ""
    pattern = ".".join(["transformer_blocks", "{}", *parts[2:]]) if block else module
    return f"{names[pattern].format(block)}.{kind}"


def _paper_sizes() -> list[dict[str, int]]:
    """Return the presets that the paper defines, S/2 to XL/2."""
    return [sizes for name, sizes in PRESETS.items() if name.endswith("/2")]


def _matches(name: str, pattern: str) -> bool:
    """Check whether a weight belongs to the module of `pattern` in any block."""
    before, _, after = pattern.partition("{}")
    return name.startswith(before) and after + "." in name


def _read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a file, the EMA's if it has them; only tensors and plain values are unpickled.

    Raises:
        ValueError: if they cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Checkpoints of the training hold their command line's options beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        # torch's text for a file with anything but tensors advises to run it.
        reason = "not a file of tensors alone" if isinstance(error, UnpicklingError) else first_line(error)
        raise ValueError(f"{path}: no weights can be read from it ({reason})") from error
    weights: Any = content if isinstance(content, dict) else {}
    # Named alike, but SiT's training, which knows paths, has another objective.
    if hasattr(weights.get("args"), "path_type"):
        raise ValueError(f"{path}: {_SIT}")
    for name in ("ema", "model"):
        if isinstance(weights.get(name), dict):
            weights = weights[name]
            break
        if weights.get(name) is not None:
            raise ValueError(f"{path}: {name} is not a dict of weights")
    weights = {str(name): tensor for name, tensor in weights.items() if isinstance(tensor, torch.Tensor)}
    for name, tensor in weights.items():
        # A view can claim any size: only what the file holds is read.
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in _DTYPES
        if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: {name} is {tensor.layout}, {tensor.dtype}, {tensor.device}; expected plain weights of "
                "16, 32 or 64 bits"
            )
    return weights
