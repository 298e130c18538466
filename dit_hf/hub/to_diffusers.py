"""Export to diffusers' own `DiTPipeline`, which loads without dit_hf and without remote code."""

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
from ..pipelines.attributes import Attributes
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from .convert import DIFFUSERS, DIFFUSERS_EMBEDDER, translate_name

NUM_CLASSES = 1000  # the null label of DiTPipeline, hard-coded there
COMPARED_STEPS = 10
MAX_DIFFERENCE = 0.05
FIT_ERROR, FIT_STEPS = 1e-4, 300  # relative error to reach, steps of L-BFGS
# Options that the built-in transformer has too, or that are converted.
_CONVERTED = {
    *("sample_size", "patch_size", "in_channels", "out_channels", "num_layers", "num_attention_heads"),
    *("attention_head_dim", "conditions", "timestep_freq_shift", "position_base_size"),
}


@dataclass
class BuiltinExport:
    """An export with its difference from the original.

    Attributes:
        pipeline: The exported pipeline.
        labels: Meaning of its class labels, as a sentence without a full stop.
        num_labels: Number of labels with a meaning of their own; 0 if they all mean the same.
        guidance_scale: The original's default.
        difference: Largest difference of a pixel (0 to 1) from the original's images.
        protocol: Protocol of the difference.
    """

    pipeline: DiTPipeline
    labels: str
    num_labels: int
    guidance_scale: float
    difference: float
    protocol: str

    def generate(self, count: int) -> list[Any]:
        """Generate `count` PIL images of the class labels in turn, on the accelerator if there is one."""
        labels = [i % max(1, self.num_labels) for i in range(count)]
        self.pipeline.to(default_device())
        generator = torch.Generator().manual_seed(0)
        return self.pipeline(labels, self.guidance_scale, generator, num_inference_steps=25).images

    def card_entries(self) -> dict[str, str]:
        """Return the entries of the card's template: what labels mean, how well it fits, an example label."""
        return {"labels": self.labels, "difference": self.sentence(), "example": "0"}

    def sentence(self) -> str:
        """Describe the difference, without a full stop."""
        text = f"Its pixels, between 0 and 1, differ from the original pipeline's by at most {self.difference:.1e}"
        return f"{text} ({self.protocol})"


def to_builtin(pipeline: LatentDiTPipeline, attributes: Attributes | None = None) -> BuiltinExport:
    """Convert a pipeline to diffusers' `DiTPipeline`, and print the largest difference between the two.

    Per-channel statistics of the latents are folded into a copy of the VAE. diffusers embeds timesteps with slightly
    other frequencies, unless the model's `timestep_freq_shift` is 1: then the two layers that follow are fitted to all
    timesteps by least squares.

    Args:
        pipeline: A pipeline with at most one condition, unless `attributes` are given.
        attributes: What every label but 1000 generates.

    Raises:
        ValueError: for a model that does not fit, with the reason.
    """
    _check_fits(pipeline, attributes)

    # Convert the parts.
    transformer = _convert_transformer(pipeline, attributes)
    schedule = {name: value for name, value in pipeline.scheduler.config.items() if name != "cosine_s"}
    stock = DPMSolverMultistepScheduler if schedule.pop("multistep", False) else DDIMScheduler
    scheduler = stock.from_config(schedule)
    export = DiTPipeline(transformer=transformer, vae=_fold_statistics(pipeline), scheduler=scheduler)
    labels = _class_names(pipeline, attributes)
    if labels is not None:
        export.register_to_config(id2label={str(i): label for i, label in enumerate(labels)})

    # Compare the two pipelines' images.
    difference, protocol = _compare(pipeline, export, attributes)
    conditions = pipeline.transformer.config.conditions or {}
    result = BuiltinExport(
        pipeline=export,
        labels=_describe_labels(pipeline, attributes),
        num_labels=0 if attributes or not conditions else max(conditions.values()),
        guidance_scale=pipeline.config.guidance_scale,
        difference=difference,
        protocol=protocol,
    )
    print(result.sentence(), flush=True)
    if difference > MAX_DIFFERENCE:
        raise ValueError(
            f"the built-in transformer gives other images: expected a difference of at most {MAX_DIFFERENCE}, got "
            f"{difference:.2f} ({protocol}); push without --builtin"
        )
    return result


def _check_fits(pipeline: LatentDiTPipeline, attributes: Attributes | None) -> None:
    """Check whether `DiTPipeline` can represent the model.

    Raises:
        ValueError: with a reason why not.
    """
    config = pipeline.transformer.config
    height, width = pipeline.transformer.latent_size
    base_height, base_width = height_and_width(config.position_base_size or config.sample_size)
    defaults = inspect.signature(LatentDiTTransformer2DModel.__init__).parameters
    conditions, reason = config.conditions or {}, None
    if height != width:
        reason = f"it generates latents of {height}x{width}, the built-in transformer only squares"
    elif (base_height, base_width) != (height, width):
        base = f"{base_height}x{base_width}"
        reason = f"its positions are stretched over {base} latents, the built-in transformer's over {height}x{width}"
    elif not isinstance(pipeline.vae, AutoencoderKL):
        reason = f"its VAE is {type(pipeline.vae).__name__}, DiTPipeline takes AutoencoderKL"
    elif len(conditions) > 1 and attributes is None:
        reason = "it has several conditions; choose their values, e.g. --attributes '{\"Smiling\": true}'"
    elif len(conditions) == 1 and max(conditions.values()) > NUM_CLASSES:
        reason = f"it has more than {NUM_CLASSES} classes"
    elif attributes and not conditions:
        reason = "it is unconditional, so it takes no --attributes"
    # An option that is not converted must have its default, the built-in transformer's only way.
    for name, value in config.items():
        if name in defaults and name not in _CONVERTED and value != defaults[name].default:
            reason = f"the built-in transformer has no {name}={value!r}"
    if reason is not None:
        raise ValueError(f"the model does not fit diffusers' DiTPipeline: {reason}")


def _convert_transformer(pipeline: LatentDiTPipeline, attributes: Attributes | None) -> DiTTransformer2DModel:
    """Build the same network under diffusers' names."""
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
    # The embedders are converted, everything else is renamed.
    weights, shapes = {}, transformer.state_dict()
    embedder = {f"time_embedding.{name}": tensor for name, tensor in _time_embedding(pipeline).items()}
    embedder["condition_embedding.weight"] = _class_table(pipeline, attributes)
    for name, tensor in {**ours.state_dict(), **embedder}.items():
        if name in embedder:  # diffusers has a copy in every block
            for block in range(config.num_layers):
                pattern = {module: other.format(block) for module, other in DIFFUSERS_EMBEDDER.items()}
                weights[translate_name(name, pattern)] = tensor
        else:
            other = translate_name(name, DIFFUSERS)
            weights[other] = tensor.reshape(shapes[other].shape)  # a linear layer may be a convolution there
    transformer.load_state_dict(weights)
    return transformer.eval()


def _class_table(pipeline: LatentDiTPipeline, attributes: Attributes | None) -> torch.Tensor:
    """Return the embedding of each label, [1001, dim]: classes, unused rows, the null condition in row 1000."""
    ours = pipeline.transformer
    table = torch.zeros(NUM_CLASSES + 1, ours.inner_dim)
    if ours.condition_embedding is None:
        return table
    # The rows of attributes that labels 0, 1, ... stand for.
    rows: list[Attributes] = [attributes] if attributes else []
    conditions = ours.config.conditions
    if not rows:
        (name,) = conditions
        rows = [{name: value} for value in range(conditions[name])]
    with torch.no_grad():
        embedded = ours._embed_conditions(pipeline.encode_attributes([*rows, {}]), len(rows) + 1)  # [rows + 1, dim]
    # Unused labels mean `attributes` if there are any, and are unconditional otherwise.
    table[:] = embedded[0] if attributes else embedded[-1]
    table[: len(rows)] = embedded[:-1]
    table[NUM_CLASSES] = embedded[-1]
    return table


def _time_embedding(pipeline: LatentDiTPipeline) -> dict[str, torch.Tensor]:
    """Return the weights of the timestep embedding for features with diffusers' `downscale_freq_shift=1`."""
    ours, total = pipeline.transformer, pipeline.scheduler.config.num_train_timesteps
    if ours.config.timestep_freq_shift == 1:
        return ours.time_embedding.state_dict()
    # Our features and diffusers', and the embedding that the fitted layers must reproduce, all in float64.
    timesteps = torch.arange(total)
    shifted = type(ours.time_proj)(256, flip_sin_to_cos=True, downscale_freq_shift=1)(timesteps).double()
    embedding = copy.deepcopy(ours.time_embedding).double().requires_grad_(False)
    features = ours.time_proj(timesteps).double()  # [timesteps, 256]
    target = embedding(features)  # [timesteps, dim]

    # Fit layer by layer in closed form.
    _fit(embedding.linear_1, shifted, embedding.linear_1(features))
    _fit(embedding.linear_2, nn.functional.silu(embedding.linear_1(shifted)), target)

    # Then both layers together: of a narrow model the first fit is not close enough.
    embedding.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        embedding.parameters(), max_iter=FIT_STEPS, history_size=50, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        error = (embedding(shifted) - target).square().sum() / target.square().sum()
        (1e4 * error).backward()
        return 1e4 * error.detach()

    if (embedding(shifted) - target).norm() > FIT_ERROR * target.norm():
        optimizer.step(loss)
    return {name: tensor.detach().float() for name, tensor in embedding.state_dict().items()}


def _fit(layer: nn.Linear, inputs: torch.Tensor, outputs: torch.Tensor, ridge: float = 1e-10) -> None:
    """Fit `layer` by ridge regression to map `inputs` [rows, m] to `outputs` [rows, n]."""
    inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)  # [rows, m + 1], the last column for the bias
    penalty = ridge * len(inputs) * torch.eye(inputs.shape[1], dtype=inputs.dtype)
    solution = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ outputs)  # [m + 1, n]
    layer.weight.copy_(solution[:-1].T)
    layer.bias.copy_(solution[-1])


@torch.no_grad()
def _fold_statistics(pipeline: LatentDiTPipeline) -> AutoencoderKL:
    """Return a copy of the VAE whose latents are the model's: normalized by channel, scaling factor 1, no shift."""
    # The copy needs both 1x1 convolutions; the VAE may lack them.
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
    # Decode: post_quant_conv(std z + mean).
    conv = vae.post_quant_conv
    weight, bias = conv.weight.double(), conv.bias.double()
    conv.bias.copy_(bias + weight[:, :, 0, 0] @ mean)
    conv.weight.copy_(weight * std[None, :, None, None])
    # Encode: (mean of the posterior - mean) / std, and the posterior's log variance - 2 log std.
    conv = vae.quant_conv
    shift, scale = torch.cat([mean, 2 * std.log()]), torch.cat([std, torch.ones_like(std)])
    conv.bias.copy_((conv.bias.double() - shift) / scale)
    conv.weight.copy_(conv.weight.double() / scale[:, None, None, None])
    return vae.eval()


def _class_names(pipeline: LatentDiTPipeline, attributes: Attributes | None) -> list[str] | None:
    """Return the names of the classes, or None if they have none."""
    conditions = pipeline.transformer.config.conditions or {}
    return pipeline.config.condition_labels.get(next(iter(conditions), None)) if not attributes else None


def _describe_labels(pipeline: LatentDiTPipeline, attributes: Attributes | None) -> str:
    """Return the meaning of the class labels as a sentence without a full stop."""
    conditions = pipeline.transformer.config.conditions or {}
    if attributes:
        return f"Every class label generates {dict(attributes)}, except for 1000, which is unconditional"
    if not conditions:
        return "The model is unconditional: the class label has no effect"
    ((name, values),) = conditions.items()
    class_names = _class_names(pipeline, attributes)
    listed = f": {', '.join(class_names)}" if class_names else ""
    return f"Class labels are 0 to {values - 1}, the values of `{name}`{listed}; 1000 is unconditional"


def _compare(pipeline: LatentDiTPipeline, export: DiTPipeline, attributes: Attributes | None) -> tuple[float, str]:
    """Return the largest difference of a pixel between both pipelines' images of the same noise, and the protocol."""
    # Compare the first class, the last one, and the null condition.
    name, values = "", 0
    if pipeline.transformer.config.conditions and not attributes:
        ((name, values),) = pipeline.transformer.config.conditions.items()
    labels = [0, max(0, values - 1), NUM_CLASSES]
    rows: list[Attributes] = [attributes or ({name: label} if name else {}) for label in labels[:2]]
    # diffusers' DDIM spaces its timesteps as ours only if the number of steps divides their total.
    total = pipeline.scheduler.config.num_train_timesteps
    steps = max(steps for steps in range(1, COMPARED_STEPS + 1) if total % steps == 0)
    options = {"num_inference_steps": steps, "guidance_scale": max(1.0, pipeline.config.guidance_scale)}
    options |= {"output_type": "np", "return_dict": False}

    export.set_progress_bar_config(disable=True)
    (ours,) = pipeline([*rows, {}], generator=torch.Generator().manual_seed(0), **options)
    (theirs,) = export(labels, generator=torch.Generator().manual_seed(0), **options)
    protocol = f"{len(labels)} images, {steps} steps, guidance {options['guidance_scale']:g}, seed 0"
    return float(abs(ours - theirs).max()), protocol
