"""A model as diffusers' own DiT pipeline, which loads without dit_hf and without any code of ours."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from torch import nn

from ..devices import default_device
from ..models.transformer_latent_dit import LatentDiTTransformer2DModel, height_and_width
from ..pipelines.guidance import Attributes
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from .convert import DIFFUSERS, DIFFUSERS_EMBEDDER, theirs

NUM_CLASSES = 1000  # DiTPipeline asks for nothing by row 1000
COMPARED_STEPS = 10
MAX_DIFFERENCE = 0.05
FIT_ERROR, FIT_STEPS = 1e-4, 300
# What the built-in transformer can be told, or has anyway.
_CONVERTED = {
    *("sample_size", "patch_size", "in_channels", "out_channels", "num_layers", "num_attention_heads"),
    *("attention_head_dim", "conditions", "timestep_freq_shift", "position_base_size"),
}


@dataclass
class BuiltinExport:
    """An export, and how well it fits.

    Args:
        pipeline: Diffusers' own.
        labels: What its class labels mean, as a sentence.
        num_labels: How many draw different things; 0 if none does.
        guidance_scale: What it is best asked with.
        difference: The largest difference of a pixel (0 to 1) to the pipeline that it was made of.
        protocol: Of that difference.
    """

    pipeline: DiTPipeline
    labels: str
    num_labels: int
    guidance_scale: float
    difference: float
    protocol: str

    def draw(self, count: int) -> list[Any]:
        """Images of the first labels, in turn."""
        labels = [i % max(1, self.num_labels) for i in range(count)]
        self.pipeline.to(default_device())
        generator = torch.Generator().manual_seed(0)
        return self.pipeline(labels, self.guidance_scale, generator, num_inference_steps=25).images

    def facts(self) -> dict[str, str]:
        """What the card says of it."""
        return {"labels": self.labels, "difference": self.sentence(), "example": "0"}

    def sentence(self) -> str:
        """The difference in words."""
        text = f"Its pixels differ from those of the pipeline it was made of by at most {self.difference:.1e}"
        return f"{text} of 1 ({self.protocol})"


def to_builtin(pipeline: LatentDiTPipeline, attributes: Attributes | None = None) -> BuiltinExport:
    """Diffusers' `DiTPipeline` of a pipeline of ours, with the largest difference between the two, which is printed.

    Per-channel statistics of the latents go into a copy of the VAE. The features that timesteps are embedded by have
    slightly other frequencies there unless the model's `timestep_freq_shift` is 1: then the two layers that follow
    are fitted to all timesteps by least squares.

    Args:
        pipeline: With a single condition, or none, or `attributes`.
        attributes: What every label but 1000 is to draw.

    Raises:
        ValueError: for a model that has no counterpart there, saying what does not fit.
    """
    _check_fits(pipeline, attributes)
    transformer = _transformer(pipeline, attributes)
    schedule = {name: value for name, value in pipeline.scheduler.config.items() if name != "cosine_s"}
    stock = DPMSolverMultistepScheduler if schedule.pop("multistep", False) else DDIMScheduler
    scheduler = stock.from_config(schedule)
    export = DiTPipeline(transformer=transformer, vae=_folded_vae(pipeline), scheduler=scheduler)
    labels = _labels(pipeline, attributes)
    if labels is not None:
        export.register_to_config(id2label={str(i): label for i, label in enumerate(labels)})
    difference, protocol = _compare(pipeline, export, attributes)
    conditions = pipeline.transformer.config.conditions or {}
    num_labels = 0 if attributes or not conditions else max(conditions.values())
    sentence = _sentence(pipeline, attributes)
    result = BuiltinExport(export, sentence, num_labels, pipeline.config.guidance_scale, difference, protocol)
    print(result.sentence(), flush=True)
    if difference > MAX_DIFFERENCE:
        raise ValueError(
            f"the built-in transformer gives other images: they differ by {difference:.2f} of 1 ({protocol}), and "
            f"{MAX_DIFFERENCE} is allowed; push without --builtin"
        )
    return result


def _check_fits(pipeline: LatentDiTPipeline, attributes: Attributes | None) -> None:
    config = pipeline.transformer.config
    height, width = pipeline.transformer.latent_size
    base_height, base_width = height_and_width(config.position_base_size or config.sample_size)
    defaults = inspect.signature(LatentDiTTransformer2DModel.__init__).parameters
    conditions, reason = config.conditions or {}, None
    if height != width:
        reason = f"it draws latents of {height}x{width}, the built-in transformer only squares"
    elif (base_height, base_width) != (height, width):
        base = f"{base_height}x{base_width}"
        reason = f"its positions are stretched over {base} latents, the built-in transformer's over {height}x{width}"
    elif not isinstance(pipeline.vae, AutoencoderKL):
        reason = f"its VAE is {type(pipeline.vae).__name__}, DiTPipeline takes AutoencoderKL"
    elif len(conditions) > 1 and attributes is None:
        reason = "it has several conditions; name what it is to draw, e.g. --attributes '{\"Smiling\": true}'"
    elif len(conditions) == 1 and max(conditions.values()) > NUM_CLASSES:
        reason = f"it has more than {NUM_CLASSES} classes"
    elif attributes and not conditions:
        reason = "it is unconditional, so there are no --attributes to draw"
    for name, value in config.items():
        if name in defaults and name not in _CONVERTED and value != defaults[name].default:
            reason = f"the built-in transformer has no {name}={value!r}"
    if reason is not None:
        raise ValueError(f"the model does not fit diffusers' DiTPipeline: {reason}")


def _transformer(pipeline: LatentDiTPipeline, attributes: Attributes | None) -> DiTTransformer2DModel:
    """The same network under diffusers' names."""
    ours = pipeline.transformer
    config = ours.config
    transformer = DiTTransformer2DModel(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=config.in_channels,
        out_channels=ours.out_channels,
        num_layers=config.num_layers,
        sample_size=ours.latent_size[0],
        patch_size=config.patch_size,
        num_embeds_ada_norm=NUM_CLASSES,
        norm_eps=1e-6,
    )
    weights, shapes = {}, transformer.state_dict()
    embedder = {f"time_embedding.{name}": tensor for name, tensor in _time_embedding(pipeline).items()}
    embedder["condition_embedding.weight"] = _class_table(pipeline, attributes)
    for name, tensor in {**ours.state_dict(), **embedder}.items():
        if name in embedder:  # which diffusers has in every block
            for block in range(config.num_layers):
                pattern = {module: other.format(block) for module, other in DIFFUSERS_EMBEDDER.items()}
                weights[theirs(name, pattern)] = tensor
        else:
            other = theirs(name, DIFFUSERS)
            weights[other] = tensor.reshape(shapes[other].shape)
    transformer.load_state_dict(weights)
    return transformer.eval()


def _class_table(pipeline: LatentDiTPipeline, attributes: Attributes | None) -> torch.Tensor:
    """An embedding a label, [1001, dim]: those of the classes, then asking for nothing, which is row 1000 too."""
    ours = pipeline.transformer
    table = torch.zeros(NUM_CLASSES + 1, ours.inner_dim)
    if ours.condition_embedding is None:
        return table
    rows: list[Attributes] = [attributes] if attributes else []
    conditions = ours.config.conditions
    if not rows:
        (name,) = conditions
        rows = [{name: value} for value in range(conditions[name])]
    with torch.no_grad():
        embedded = ours._embed_conditions(pipeline.encode_attributes([*rows, {}]), len(rows) + 1)
    table[:] = embedded[0] if attributes else embedded[-1]
    table[: len(rows)], table[NUM_CLASSES] = embedded[:-1], embedded[-1]
    return table


def _time_embedding(pipeline: LatentDiTPipeline) -> dict[str, torch.Tensor]:
    """Weights of the timesteps' two layers for features with `downscale_freq_shift=1`."""
    ours, total = pipeline.transformer, pipeline.scheduler.config.num_train_timesteps
    if ours.config.timestep_freq_shift == 1:
        return ours.time_embedding.state_dict()
    timesteps = torch.arange(total)
    shifted = type(ours.time_proj)(256, flip_sin_to_cos=True, downscale_freq_shift=1)(timesteps).double()
    embedding = copy.deepcopy(ours.time_embedding).double().requires_grad_(False)
    features = ours.time_proj(timesteps).double()
    wanted = embedding(features)
    # Layer by layer, and then both together, because a narrow model is not fitted well enough by the first.
    _fit(embedding.linear_1, shifted, embedding.linear_1(features))
    _fit(embedding.linear_2, nn.functional.silu(embedding.linear_1(shifted)), wanted)
    embedding.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        embedding.parameters(), max_iter=FIT_STEPS, history_size=50, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        error = (embedding(shifted) - wanted).square().sum() / wanted.square().sum()
        (1e4 * error).backward()
        return 1e4 * error.detach()

    if (embedding(shifted) - wanted).norm() > FIT_ERROR * wanted.norm():
        optimizer.step(loss)
    return {name: tensor.detach().float() for name, tensor in embedding.state_dict().items()}


def _fit(layer: nn.Linear, inputs: torch.Tensor, outputs: torch.Tensor, ridge: float = 1e-10) -> None:
    """Make `layer` the one that is nearest, by least squares, to giving `outputs` [rows, n] for `inputs` [rows, m]."""
    inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
    penalty = ridge * len(inputs) * torch.eye(inputs.shape[1], dtype=inputs.dtype)
    solution = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ outputs)
    layer.weight.copy_(solution[:-1].T)
    layer.bias.copy_(solution[-1])


@torch.no_grad()
def _folded_vae(pipeline: LatentDiTPipeline) -> AutoencoderKL:
    """A copy of the VAE whose latents are the model's own: normalised by channel, scaling factor 1, no shift."""
    own = {"scaling_factor": 1.0, "shift_factor": None, "use_quant_conv": True, "use_post_quant_conv": True}
    config = {name: value for name, value in pipeline.vae.config.items() if name != "_name_or_path"}
    vae = AutoencoderKL.from_config(config, **own)
    vae.load_state_dict(pipeline.vae.state_dict(), strict=False)
    channels = vae.config.latent_channels
    for name, width in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        if not pipeline.vae.config[f"use_{name}"]:
            getattr(vae, name).weight.copy_(torch.eye(width)[:, :, None, None])
            getattr(vae, name).bias.zero_()
    mean, std = (torch.tensor(pipeline.config[f"latents_{name}"], dtype=torch.float64) for name in ("mean", "std"))
    # Decoding: post_quant_conv(std z + mean).
    conv = vae.post_quant_conv
    weight, bias = conv.weight.double(), conv.bias.double()
    conv.bias.copy_(bias + weight[:, :, 0, 0] @ mean)
    conv.weight.copy_(weight * std[None, :, None, None])
    # Encoding: (mean of the posterior - mean) / std, and its logarithmic variance less 2 log std.
    conv = vae.quant_conv
    shift, scale = torch.cat([mean, 2 * std.log()]), torch.cat([std, torch.ones_like(std)])
    conv.bias.copy_((conv.bias.double() - shift) / scale)
    conv.weight.copy_(conv.weight.double() / scale[:, None, None, None])
    return vae.eval()


def _labels(pipeline: LatentDiTPipeline, attributes: Attributes | None) -> list[str] | None:
    """Names of the classes, where they have names."""
    conditions = pipeline.transformer.config.conditions or {}
    return pipeline.config.condition_labels.get(next(iter(conditions), None)) if not attributes else None


def _sentence(pipeline: LatentDiTPipeline, attributes: Attributes | None) -> str:
    """What the class labels mean."""
    conditions = pipeline.transformer.config.conditions or {}
    if attributes:
        return f"Every class label draws {dict(attributes)}, and 1000 anything"
    if not conditions:
        return "It is unconditional: every class label draws anything"
    ((name, values),) = conditions.items()
    names = _labels(pipeline, attributes)
    shown = f": {', '.join(names)}" if names else ""
    return f"Class labels are 0 to {values - 1}, the values of `{name}`{shown}; 1000 draws anything"


def _compare(pipeline: LatentDiTPipeline, export: DiTPipeline, attributes: Attributes | None) -> tuple[float, str]:
    """The largest difference of a pixel between what both draw from the same noise, and the protocol of that."""
    total, (name, values) = pipeline.scheduler.config.num_train_timesteps, ("", 0)
    if pipeline.transformer.config.conditions and not attributes:
        ((name, values),) = pipeline.transformer.config.conditions.items()
    labels = [0, max(0, values - 1), NUM_CLASSES]
    rows: list[Attributes] = [attributes or ({name: label} if name else {}) for label in labels[:2]]
    steps = max(steps for steps in range(1, COMPARED_STEPS + 1) if total % steps == 0)
    options = {"num_inference_steps": steps, "guidance_scale": max(1.0, pipeline.config.guidance_scale)}
    options |= {"output_type": "np", "return_dict": False}
    export.set_progress_bar_config(disable=True)
    (ours,) = pipeline([*rows, {}], generator=torch.Generator().manual_seed(0), **options)
    (others,) = export(labels, generator=torch.Generator().manual_seed(0), **options)
    protocol = f"{len(labels)} images, {steps} steps, guidance {options['guidance_scale']:g}, seed 0"
    return float(abs(ours - others).max()), protocol
