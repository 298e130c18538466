"""The recipe: one dataclass per section, set by YAML (`recipe_file.py`) and `--section.key` options (jsonargparse).

The text below a field is its help, and `number` holds its bounds: neither is written anywhere else.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from jsonargparse import set_parsing_settings

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # of the fields below

Precision = Literal["no", "fp16", "bf16"]

# Sizes by name; those with a patch size in the name are DiT's (table 1 of the paper).
PRESETS: dict[str, dict[str, int]] = {
    name: {"patch_size": 2, "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim}
    for name, layers, heads, head_dim in (
        ("tiny", 6, 3, 64),
        ("reference", 10, 8, 96),
        ("S/2", 12, 6, 64),
        ("B/2", 12, 12, 64),
        ("L/2", 24, 16, 64),
        ("XL/2", 28, 16, 72),
    )
}


LINEAR_TIMESTEPS = 1000  # of the linear schedule
_UNBOUNDED = {"low": -math.inf, "high": math.inf, "above": -math.inf, "below": math.inf}


def number(default: Any, **bounds: float) -> Any:
    """Declare a field of numbers from `low` to `high`, or strictly `above` one or `below` one.

    Of a list each entry is checked; None always passes.
    """
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=bounds)
    return field(default=default, metadata=bounds)


@dataclass
class DataConfig:
    """The data to train on."""

    latents: str = "runs/demo/latents"
    """A latent cache made by `dit-hf prepare-latents`."""
    conditions: list[str] | None = None
    """Condition columns of the cache to train on; null takes all of them, [] none."""
    normalization: Literal["channel", "scaling_factor"] = "channel"
    """`channel` normalizes each channel of the latents to mean 0 and standard deviation 1 with the cache's statistics;
    `scaling_factor` only multiplies by the VAE's scaling factor.
    """
    sample_posterior: bool = True
    """Sample the VAE's posterior anew at every step; false reads its mean."""
    flip: bool = True
    """Read half of the images mirrored, if the cache was made with `--flip`."""


@dataclass
class ModelConfig:
    """The transformer. Sizes that are null come from the preset, channels and latent size from the cache."""

    preset: str = "reference"
    """Sizes by name: `tiny`, `reference`, `S/2`, `B/2`, `L/2` or `XL/2`."""
    patch_size: int | None = number(None, low=1, high=1000)
    """Side of a patch, in latents."""
    num_layers: int | None = number(None, low=1, high=1000)
    """Number of transformer blocks."""
    num_attention_heads: int | None = number(None, low=1, high=1000)
    """Number of attention heads."""
    attention_head_dim: int | None = number(None, low=1, high=10_000)
    """Width of an attention head."""
    mlp_ratio: float = number(4.0, above=0, high=100)
    """Width of the feed-forward layers, as a multiple of the model's width."""
    qk_norm: Literal["rms_norm"] | None = None
    """`rms_norm` normalizes queries and keys, which keeps attention stable in half precision."""
    use_rotary_positional_embeddings: bool = False
    """Also rotate queries and keys by their position (RoPE)."""
    init_from: str | None = None
    """Initialize from this model: the folder of a run, of a checkpoint or of a pipeline, or a Hub id
    (`OWNER/NAME@REVISION`). Its conditions and resolution may differ; its sizes, patches and prediction type must not.
    """

    def sizes(self) -> dict[str, Any]:
        """Return the sizes as keywords of `LatentDiTTransformer2DModel`."""
        own = {name: getattr(self, name) for name in PRESETS[self.preset]}
        sizes = {name: PRESETS[self.preset][name] if value is None else value for name, value in own.items()}
        alike = ("mlp_ratio", "qk_norm", "use_rotary_positional_embeddings")
        return {**sizes, **{name: getattr(self, name) for name in alike}}


@dataclass
class ObjectiveConfig:
    """The training objective: prediction target, loss and noise levels."""

    prediction_type: Literal["sample", "v_prediction", "epsilon"] = "v_prediction"
    """`sample` (the clean latent) or `v_prediction`; `epsilon` (the noise) only continues a model that predicts it
    (`model.init_from`): at the highest noise level, where sampling starts, its errors are amplified ten thousand times
    in the clean latent.
    """
    beta_schedule: Literal["squaredcos_cap_v2", "linear"] = "squaredcos_cap_v2"
    """The noise levels: `squaredcos_cap_v2` (cosine); `linear`, the 1,000 of https://arxiv.org/abs/2006.11239, only
    continues a model that has them, such as facebook/DiT-XL-2-256.
    """
    loss: Literal["l1", "l2", "huber"] = "l2"
    """`l1`, `l2` or `huber` (pseudo-Huber)."""
    huber_c: float = number(0.1, low=1e-6)
    """The error at which `huber` changes from L2 to L1."""
    snr_gamma: float | None = number(5.0, above=0)
    """Gamma of min-SNR weighting (https://arxiv.org/abs/2303.09556); null is no weighting."""
    snr_weighting: Literal["min", "soft_min"] = "min"
    """`min`, or `soft_min`, its smooth form (https://arxiv.org/abs/2401.11605)."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """`uniform`, or `logit_normal`, which samples medium noise levels more often."""
    logit_mean: float = 0.0
    """Mean of log(sigma / alpha) of the levels that `logit_normal` samples; above 0 is noisier."""
    logit_std: float = number(1.0, low=1e-6)
    """Standard deviation of log(sigma / alpha) of the levels that `logit_normal` samples."""
    num_train_timesteps: int = number(500, low=1, high=100_000)
    """Number of noise levels."""
    condition_dropout: float = number(0.15, low=0, high=0.5)  # it applies twice
    """Share of the images trained without any condition, for classifier-free guidance. As many again keep a random
    subset of theirs, so that a request may name a few attributes and leave the others open.
    """


@dataclass
class OptimConfig:
    """The optimizer, its learning rate over time, and the exponential moving average (EMA) of the weights."""

    optimizer: Literal["adamw", "apex_fused_adam", "muon"] = "adamw"
    """`adamw`; `apex_fused_adam` (NVIDIA apex's, in fp16 on CUDA where apex is installed, otherwise `adamw`, which
    takes the same steps); or `muon` for the matrices of attention, head by head, and of feed-forward layers, with Adam
    for the rest.
    """
    learning_rate: float = number(1e-4, low=0)
    """Learning rate after warm-up."""
    lr_scheduler: Literal["constant", "cosine", "linear"] = "constant"
    """`constant`, `cosine` (to 0 at the end) or `linear` (constant, then to 0 over `lr_decay_ratio`)."""
    lr_warmup_steps: int = number(0, low=0)
    """Steps of linear warm-up."""
    lr_decay_ratio: float = number(0.4, low=0, high=1)
    """Share of the run, at its end, over which `linear` decays."""
    adam_beta1: float = number(0.9, low=0, below=1)
    """Decay of Adam's first moment."""
    adam_beta2: float = number(0.999, low=0, below=1)
    """Decay of Adam's second moment."""
    adam_epsilon: float = number(1e-8, above=0)
    """Added to Adam's denominator."""
    adam_weight_decay: float = number(0.0, low=0)
    """Decoupled weight decay of the matrices; biases, gains and embeddings have none."""
    max_grad_norm: float = number(1.0, low=0)
    """Clip the gradient to this norm; 0 does not clip."""
    ema_decay: float = number(0.9999, low=0, high=1)
    """Decay of the EMA, approached by (1 + step) / (10 + step); 0 keeps the weights themselves. The EMA is what is
    validated, sampled and exported.
    """
    extra_ema_decays: list[float] = number([], low=0, high=1)  # noqa: RUF009 (a field with a factory)
    """Decays of further EMAs, each validated and exported (as `ema-<decay>/`) beside the first."""


@dataclass
class TrainConfig:
    """The run: where it writes, how long it trains, what it logs and saves, and when."""

    output_dir: str = "runs/train"
    """Folder of the run."""
    max_train_steps: int = number(100_000, low=1)
    """Optimizer steps of the whole run."""
    global_batch_size: int = number(64, low=1)
    """Images per optimizer step, over all ranks and micro-batches."""
    gradient_accumulation_steps: int = number(1, low=1)
    """Micro-batches that each rank splits its batch into; more need less memory."""
    gradient_checkpointing: bool = False
    """Save memory for about a third more time."""
    torch_compile: bool | None = None
    """Compile the blocks with torch.compile, which needs a C++ compiler on a CPU; null compiles on CUDA where a
    compiler works. A resumed run keeps what it began with.
    """
    mixed_precision: Precision | None = None
    """`no`, `fp16` or `bf16`; null takes what `accelerate launch` was configured with, or fp16 on CUDA without it."""
    seed: int = number(0, low=0, high=2**63 - 1)
    """All randomness is a function of the seed, the step and the position in the global batch."""
    deterministic: bool = False
    """Use only kernels that give the same bits every time, as a CPU's do; slower on a GPU."""
    resume_from_checkpoint: str | None = None
    """Resume from `latest`, or from the checkpoint of this name in `output_dir`."""
    checkpointing_steps: int = number(5_000, low=1)
    """Steps between checkpoints; the EMA is validated at each."""
    checkpoints_total_limit: int = number(2, low=1)
    """Number of the newest checkpoints to keep."""
    best_checkpoints_limit: int = number(1, low=0)
    """Number of checkpoints with the lowest validation loss to keep beside them (listed in `best.json`)."""
    validation_images: int = number(256, low=0)
    """Held-out images in the validation loss, each at ten noise levels; 0 does not validate."""
    logging_steps: int = number(50, low=1)
    """Steps between rows of `training_log.csv`."""
    sampling_steps: int = number(5_000, low=0)
    """Steps between sample grids; 0 makes none."""
    num_inference_steps: int = number(25, low=1)
    """Denoising steps of the sample grids."""
    guidance_scale: float = 2.0
    """Guidance of the sample grids, and the default of the exported pipeline."""
    evaluation_steps: int = number(0, low=0)
    """Steps between measurements of the samples' Fréchet distance, a column of the log; 0 measures none."""
    evaluation_samples: int = number(2000, low=16)
    """Number of samples for the Fréchet distance."""
    evaluation_features: str = "efficientnet-lite0"
    """Feature network of the Fréchet distance, as in `dit-hf evaluate`; with `inception` it is the FID."""
    report_to: Literal["wandb", "tensorboard", "trackio", "none"] = "wandb"
    """Tracker to log to beside the run's own files: `wandb`, `tensorboard`, `trackio` or `none`."""
    push_to_hub: bool = False
    """Push the run to the Hub: in the background every `push_to_hub_steps`, and when it is finished."""
    push_to_hub_steps: int = number(0, low=0)
    """Steps between pushes; 0 pushes only at the end."""
    hub_model_id: str | None = None
    """Repository to push to, `OWNER/NAME`."""
    hub_private_repo: bool = False
    """Make a new repository private."""
    hub_revision: str | None = None
    """Branch to push to, or an open pull request, `refs/pr/1`; null is main."""


@dataclass
class Config:
    """A recipe: everything that decides what a run learns and how it runs."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_yaml(self) -> str:
        """Return the recipe as YAML."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    def check(self) -> None:
        """Refuse a recipe that cannot work.

        Raises:
            ValueError: naming the key.
        """
        if self.model.preset not in PRESETS:
            raise ValueError(f"model.preset={self.model.preset!r} is unknown; the presets are {', '.join(PRESETS)}")
        for section, options in vars(self).items():
            for option in dataclasses.fields(options):
                bounds = {**_UNBOUNDED, **option.metadata}
                _check_bounds(f"{section}.{option.name}", getattr(options, option.name), **bounds)
        self._check_objective()
        if self.train.num_inference_steps > self.objective.num_train_timesteps:
            raise ValueError("train.num_inference_steps must not be above objective.num_train_timesteps")
        for key, value in (("train.output_dir", self.train.output_dir), ("data.latents", self.data.latents)):
            if not value.strip():
                raise ValueError(f"{key} is empty: name a folder (. is the one you are in)")
        conditions = self.data.conditions or []
        for name in conditions:
            if conditions.count(name) > 1:
                raise ValueError(f"data.conditions names {name!r} twice")
        if self.train.push_to_hub and not self.train.hub_model_id:
            raise ValueError("train.push_to_hub needs train.hub_model_id, the repository to push to (OWNER/NAME)")

    def _check_objective(self) -> None:
        """Refuse noise levels and targets that are there to continue an earlier model alone, and what they exclude."""
        objective = self.objective
        continued = self.model.init_from is not None or self.train.resume_from_checkpoint is not None
        for key in ("prediction_type", "beta_schedule"):
            value = getattr(objective, key)
            if value in ("epsilon", "linear") and not continued:
                raise ValueError(f"objective.{key} {value} needs model.init_from, a model that was trained with it")
        if objective.beta_schedule == "linear" and objective.num_train_timesteps != LINEAR_TIMESTEPS:
            raise ValueError(
                f"objective.beta_schedule linear has {LINEAR_TIMESTEPS} levels, and objective.num_train_timesteps is "
                f"{objective.num_train_timesteps}"
            )
        if objective.beta_schedule == "linear" and objective.timestep_sampling == "logit_normal":
            raise ValueError("objective.timestep_sampling logit_normal is of the cosine's levels; give uniform")

    def resume_keys(self) -> dict[str, Any]:
        """Return the keys that a resumed run must share with its checkpoint: all that decide what is learned."""
        keys = dataclasses.asdict(self)
        keys["data"].pop("latents")
        keys["model"].pop("init_from")
        if keys["optim"]["optimizer"] == "apex_fused_adam":  # which takes the same steps
            keys["optim"]["optimizer"] = "adamw"
        keys["train"] = {name: keys["train"][name] for name in ("global_batch_size", "seed")}
        return keys


def _check_bounds(key: str, value: Any, low: float, high: float, above: float, below: float) -> None:
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, int | float):
            continue
        if not math.isfinite(entry):
            raise ValueError(f"{key}={entry:g} must be a finite number")
        if not (low <= entry <= high and above < entry < below):
            if math.isfinite(low) and math.isfinite(high):
                raise ValueError(f"{key}={entry:g} must be between {low:g} and {high:g}")
            limits = {"at least": low, "above": above, "at most": high, "below": below}
            named = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit))
            raise ValueError(f"{key}={entry:g} must be {named}")
