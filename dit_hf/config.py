"""What a recipe says: one dataclass a section, read by jsonargparse from YAML and `--section.key` options."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from .storage import shipped_file

Precision = Literal["no", "fp16", "bf16"]


@dataclass
class DataConfig:
    """What is learned from.

    Args:
        latents: A latent cache made by `dit-hf prepare-latents`.
        conditions: Condition columns of the cache to train on; null is all of them, [] is none.
        normalization: `channel` brings each channel of the latents to mean 0 and standard deviation 1 by the cache's
            statistics, `scaling_factor` only multiplies by the VAE's scaling factor.
        sample_posterior: Draw fresh samples of the VAE's posterior; false reads its mean.
        flip: Mirror half of the images, where the cache holds them mirrored.
    """

    latents: str = "runs/demo/latents"
    conditions: list[str] | None = None
    normalization: Literal["channel", "scaling_factor"] = "channel"
    sample_posterior: bool = True
    flip: bool = True


@dataclass
class ModelConfig:
    """The transformer; sizes that are null come from the preset, channels and latent size from the cache.

    Args:
        preset: Sizes by name: `tiny`, `reference`, `S/2`, `B/2`, `L/2` or `XL/2`.
        patch_size: Side of the patches in latents.
        num_layers: Blocks.
        num_attention_heads: Heads.
        attention_head_dim: Width of a head.
        mlp_ratio: Width of the feed-forward layers over the model's width.
        qk_norm: `rms_norm` normalises queries and keys, which keeps attention stable in half precision.
        use_rotary_positional_embeddings: Queries and keys are turned by their position, too.
        init_from: The folder of a run, of one of its checkpoints or of a pipeline, or a Hub id, whose weights training
            begins with. It may have other conditions or another resolution; sizes, patches and what it predicts must
            be the same.
    """

    preset: str = "reference"
    patch_size: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    attention_head_dim: int | None = None
    mlp_ratio: float = 4.0
    qk_norm: Literal["rms_norm"] | None = None
    use_rotary_positional_embeddings: bool = False
    init_from: str | None = None

    def sizes(self) -> dict[str, Any]:
        """Keywords for `LatentDiTTransformer2DModel`."""
        own = {name: getattr(self, name) for name in PRESETS[self.preset]}
        sizes = {name: PRESETS[self.preset][name] if value is None else value for name, value in own.items()}
        alike = ("mlp_ratio", "qk_norm", "use_rotary_positional_embeddings")
        return {**sizes, **{name: getattr(self, name) for name in alike}}


@dataclass
class ObjectiveConfig:
    """What the model learns to predict.

    Args:
        prediction_type: `sample` (the clean latent) or `v_prediction`. The noise is none of them: at the noisiest
            level, where sampling begins, its error would count ten thousand times in the clean latent.
        loss: `l1`, `l2` or `huber` (pseudo-Huber).
        huber_c: Where `huber` goes from L2 to L1.
        snr_gamma: Min-SNR weighting (https://arxiv.org/abs/2303.09556) with this gamma; null is no weighting.
        snr_weighting: `min`, or `soft_min`, which has no corner (https://arxiv.org/abs/2401.11605).
        timestep_sampling: `uniform`, or `logit_normal`, which trains the levels in between more often.
        logit_mean: Mean of log(sigma / alpha) of the levels that `logit_normal` draws; above 0 is noisier.
        logit_std: Its standard deviation.
        num_train_timesteps: Levels of the cosine schedule.
        condition_dropout: Share of the images trained without any condition, for guidance; as many again keep only a
            random part of theirs, so that sampling may ask for a few attributes and leave the others open.
    """

    prediction_type: Literal["sample", "v_prediction"] = "v_prediction"
    loss: Literal["l1", "l2", "huber"] = "l2"
    huber_c: float = 0.1
    snr_gamma: float | None = 5.0
    snr_weighting: Literal["min", "soft_min"] = "min"
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    num_train_timesteps: int = 500
    condition_dropout: float = 0.15


@dataclass
class OptimConfig:
    """The optimizer, its learning rate over time, and the moving average of the weights.

    Args:
        optimizer: `adamw`; `apex_fused_adam` (NVIDIA apex's, in fp16 on CUDA where apex is installed, otherwise
            `adamw`, which takes the same steps); or `muon` for the matrices of attention and feed-forward layers with
            Adam for the rest.
        learning_rate: After warm-up.
        lr_scheduler: `constant`, `cosine` (to 0 at the end) or `linear` (constant, then to 0 over `lr_decay_ratio`).
        lr_warmup_steps: Steps of linear warm-up.
        lr_decay_ratio: Share of the run at its end over which `linear` decays.
        adam_beta1: First moment.
        adam_beta2: Second moment.
        adam_epsilon: Added to the denominator.
        adam_weight_decay: Decoupled weight decay of the matrices; biases, gains and embeddings have none.
        max_grad_norm: Gradients are clipped to this norm; 0 is no clipping.
        ema_decay: Of the moving average, reached by (1 + step) / (10 + step); 0 is no averaging. These are the weights
            that are validated, sampled and exported.
        extra_ema_decays: Of further averages, which are validated and exported (as `ema-<decay>/`) beside that one.
    """

    optimizer: Literal["adamw", "apex_fused_adam", "muon"] = "adamw"
    learning_rate: float = 1e-4
    lr_scheduler: Literal["constant", "cosine", "linear"] = "constant"
    lr_warmup_steps: int = 0
    lr_decay_ratio: float = 0.4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    adam_weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    extra_ema_decays: list[float] = field(default_factory=list)


@dataclass
class TrainConfig:
    """The run.

    Args:
        output_dir: The run's folder.
        max_train_steps: Optimizer steps.
        global_batch_size: Images a step, over all ranks and accumulation steps.
        gradient_accumulation_steps: Parts a rank's share of the batch is computed in.
        gradient_checkpointing: Less memory for about a third more time.
        torch_compile: Compile the blocks with torch.compile, which needs a C++ compiler on a CPU; null compiles on
            CUDA where a compiler works. A resumed run keeps what it began with.
        mixed_precision: `no`, `fp16` or `bf16`; null is what `accelerate launch` was configured with, and without it
            fp16 on a CUDA GPU.
        seed: All randomness is a function of it, the step, and the position in the batch.
        deterministic: Only kernels that give the same bits each time, as a CPU's do; slower on a GPU.
        resume_from_checkpoint: `latest`, or the name of a checkpoint in `output_dir`.
        checkpointing_steps: Steps between checkpoints; the averaged weights are validated at each.
        checkpoints_total_limit: How many of the newest are kept.
        best_checkpoints_limit: How many of those with the lowest validation loss are kept beside them (`best.json`).
        validation_images: Held-out images in the validation loss, each at ten noise levels; 0 is no validation.
        logging_steps: Steps between rows of `training_log.csv`.
        sampling_steps: Steps between sample image grids; 0 draws none.
        num_inference_steps: Of the sample image grids.
        guidance_scale: Of the sample image grids, and the default of the exported pipeline.
        evaluation_steps: Steps between measurements of the samples' Fréchet distance (a column of the log, with its
            number of samples in its name); 0 measures none.
        evaluation_samples: How many samples.
        evaluation_features: The feature network, see `dit-hf evaluate`; `inception` makes it a FID.
        report_to: `wandb`, `tensorboard` or `none`.
        push_to_hub: Share the run on the Hub: in the background every `push_to_hub_steps`, and when it is finished.
        push_to_hub_steps: Steps between pushes; 0 is only at the end.
        hub_model_id: The repository, `OWNER/NAME`.
        hub_private_repo: Whether it is private, if it is a new one.
        hub_revision: The branch that is pushed to; null is main.
    """

    output_dir: str = "runs/train"
    max_train_steps: int = 100_000
    global_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    torch_compile: bool | None = None
    mixed_precision: Precision | None = None
    seed: int = 0
    deterministic: bool = False
    resume_from_checkpoint: str | None = None
    checkpointing_steps: int = 5_000
    checkpoints_total_limit: int = 2
    best_checkpoints_limit: int = 1
    validation_images: int = 256
    logging_steps: int = 50
    sampling_steps: int = 5_000
    num_inference_steps: int = 25
    guidance_scale: float = 2.0
    evaluation_steps: int = 0
    evaluation_samples: int = 2000
    evaluation_features: str = "efficientnet-lite0"
    report_to: Literal["wandb", "tensorboard", "none"] = "wandb"
    push_to_hub: bool = False
    push_to_hub_steps: int = 0
    hub_model_id: str | None = None
    hub_private_repo: bool = False
    hub_revision: str | None = None


# What numbers may be: section, key, lowest and highest.
_BOUNDS: dict[str, dict[str, tuple[float, float]]] = {
    "model": dict.fromkeys(("patch_size", "num_layers", "num_attention_heads", "attention_head_dim"), (1, math.inf)),
    "objective": {
        "num_train_timesteps": (1, math.inf),
        **dict.fromkeys(("huber_c", "logit_std"), (1e-6, math.inf)),
        "condition_dropout": (0, 0.5),  # it applies twice
    },
    "optim": {
        **dict.fromkeys(("learning_rate", "lr_warmup_steps", "adam_weight_decay", "max_grad_norm"), (0, math.inf)),
        **dict.fromkeys(("ema_decay", "extra_ema_decays", "lr_decay_ratio", "adam_beta1", "adam_beta2"), (0, 1)),
    },
    "train": {
        **dict.fromkeys(("max_train_steps", "global_batch_size", "gradient_accumulation_steps"), (1, math.inf)),
        **dict.fromkeys(("checkpointing_steps", "checkpoints_total_limit", "logging_steps"), (1, math.inf)),
        **dict.fromkeys(("best_checkpoints_limit", "validation_images", "sampling_steps"), (0, math.inf)),
        "push_to_hub_steps": (0, math.inf),
        "seed": (0, 2**63 - 1),
        "num_inference_steps": (1, math.inf),
        "evaluation_steps": (0, math.inf),
        "evaluation_samples": (16, math.inf),
    },
}


@dataclass
class Config:
    """A recipe: everything that decides what a run learns, and how it runs."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_yaml(self) -> str:
        """As a recipe's file."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    def check(self) -> None:
        """Refuse what cannot work, before any work.

        Raises:
            ValueError: naming the key.
        """
        if self.model.preset not in PRESETS:
            raise ValueError(f"model.preset={self.model.preset!r} is unknown; known are {', '.join(PRESETS)}")
        for section, bounds in _BOUNDS.items():
            for name, (low, high) in bounds.items():
                value = getattr(getattr(self, section), name)
                for number in value if isinstance(value, list) else [value]:
                    if number is not None and not low <= number <= high:
                        between = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
                        raise ValueError(f"{section}.{name}={number:g} must be {between}")
        if self.objective.snr_gamma is not None and self.objective.snr_gamma <= 0:
            raise ValueError("objective.snr_gamma must be above 0, or null for no weighting")
        if self.train.num_inference_steps > self.objective.num_train_timesteps:
            raise ValueError("train.num_inference_steps must not be above objective.num_train_timesteps")
        if self.train.push_to_hub and not self.train.hub_model_id:
            raise ValueError("train.push_to_hub needs train.hub_model_id, the repository to push to (OWNER/NAME)")

    def resume_keys(self) -> dict[str, Any]:
        """What must be the same for a run to be continued: every key that decides what is learned, step by step."""
        resume_keys = dataclasses.asdict(self)
        resume_keys["data"].pop("latents")
        resume_keys["model"].pop("init_from")
        if resume_keys["optim"]["optimizer"] == "apex_fused_adam":  # which takes the same steps
            resume_keys["optim"]["optimizer"] = "adamw"
        resume_keys["train"] = {name: resume_keys["train"][name] for name in ("global_batch_size", "seed")}
        return resume_keys


def read_config(path: Path) -> Config:
    """The recipe that a file holds; what it leaves out is at its default."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config)
    values = parser.instantiate(parser.parse_object(yaml.safe_load(path.read_text(encoding="utf-8"))))
    return Config(values.data, values.model, values.objective, values.optim, values.train)


def recipe_path(name: str) -> Path:
    """A recipe's file: `name` itself, or the recipe of that name that came with dit_hf.

    Raises:
        FileNotFoundError: if there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    if not name or str(Path(name).parent) not in (".", "recipes"):
        raise FileNotFoundError(f"{name!r}: no such file")
    return shipped_file(f"recipes/{Path(name).with_suffix('.yaml').name}")


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
