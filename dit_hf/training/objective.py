"""The training objective: the random numbers of a step, the target of the prediction, and the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..config import ObjectiveConfig
from ..schedulers.scheduling_cosine_latent import CosineLatentScheduler
from ..seeds import mixed_seed

# The log and the validation report losses by tenths of the schedule.
NOISE_LEVELS = 10


@dataclass
class StepRandomness:
    """The random numbers of a step, for the whole global batch or a slice of it.

    Args:
        timesteps: float32 [batch], whole numbers 0 … T - 1.
        noise: float32 [batch, channels, height, width], unit normal; what is added to the latents.
        posterior_noise: The same shape; picks the sample of the VAE's posterior.
        keep: bool [batch, conditions]; False where a condition is replaced by the null condition.
    """

    timesteps: torch.Tensor
    noise: torch.Tensor
    posterior_noise: torch.Tensor
    keep: torch.Tensor

    def __getitem__(self, part: slice) -> StepRandomness:
        return StepRandomness(self.timesteps[part], self.noise[part], self.posterior_noise[part], self.keep[part])


def sample_step_randomness(
    config: ObjectiveConfig,
    seed: int,
    step: int,
    latents_shape: tuple[int, ...],
    num_conditions: int,
    device: torch.device,
) -> StepRandomness:
    """Sample the random numbers of one step, a pure function of (seed, step), for the whole global batch.

    Args:
        config: The recipe's objective.
        seed: Of the run.
        step: Optimizer step (from 0).
        latents_shape: (batch, channels, height, width).
        num_conditions: How many conditions each image has.
        device: Where the numbers are sampled. A GPU's generator gives other numbers than a CPU's.
    """
    # One generator for all, so the order of these calls is part of what a seed means: never reorder them, and add new
    # ones at the end.
    generator = torch.Generator(device).manual_seed(mixed_seed(seed, step))
    batch = latents_shape[0]
    timesteps = sample_timesteps(config, batch, generator, device)
    noise = torch.randn(latents_shape, generator=generator, device=device)
    posterior_noise = torch.randn(latents_shape, generator=generator, device=device)

    # Condition dropout: a share p of the images keeps no condition, another share p keeps each condition with a
    # probability that is sampled for the image, and the others keep all.
    kind = torch.rand((batch, 1), generator=generator, device=device)
    probability = torch.rand((batch, 1), generator=generator, device=device)
    each = torch.rand((batch, num_conditions), generator=generator, device=device)
    p = config.condition_dropout
    keep = (kind >= 2 * p) | ((kind >= p) & (each < probability))  # [batch, conditions]
    return StepRandomness(timesteps, noise, posterior_noise, keep)


def sample_timesteps(
    config: ObjectiveConfig, batch: int, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """Sample the timesteps of `batch` images, float32 [batch], by the recipe's density.

    With `logit_normal` the ratio of noise to signal, `sigma / alpha`, is log-normal. These are the noise levels of
    flow matching with logit-normal times (Esser et al., https://arxiv.org/abs/2403.03206, section 3.1), where that
    ratio is `t / (1 - t)`.
    """
    total = config.num_train_timesteps
    if config.timestep_sampling == "uniform":
        return torch.randint(total, (batch,), generator=generator, device=device).float()
    # On the cosine schedule alpha = cos(angle) and sigma = sin(angle), and the angle is proportional to the timestep,
    # but for the small offset s: the ratio is the angle's tangent.
    normal = torch.randn(batch, generator=generator, device=device)
    angle = (config.logit_mean + config.logit_std * normal).exp().atan()
    return (angle * (2 / math.pi) * total).floor().clamp(max=total - 1)


def sample_flips(seed: int, step: int, batch: int) -> np.ndarray:
    """Sample which images of a step's global batch are mirrored, bool [batch]."""
    # With numpy and a third word in the seed: the batch is read on the CPU, ahead of the step's other random numbers.
    return np.random.default_rng([seed, step, 1]).random(batch) < 0.5


def noise_level(timesteps: torch.Tensor, num_train_timesteps: int) -> torch.Tensor:
    """Return the tenth of the schedule that each timestep is in, float32 one-hot [batch, NOISE_LEVELS]."""
    # One-hot, so that sums by level are matrix products: index_add_ is not deterministic on a GPU.
    levels = (timesteps * NOISE_LEVELS / num_train_timesteps).long()
    # Not F.one_hot, which on a CPU reads the largest level back to check it.
    return (levels[:, None] == torch.arange(NOISE_LEVELS, device=levels.device)).float()  # [batch, NOISE_LEVELS]


def training_target(
    scheduler: CosineLatentScheduler, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Return the target of the prediction by the scheduler's `prediction_type`, the shape of `clean`.

    Args:
        scheduler: Of the recipe, see `build_scheduler`.
        clean: Normalized clean latents, [batch, channels, height, width].
        noise: The same shape.
        timesteps: float32 [batch].
    """
    if scheduler.config.prediction_type == "sample":
        return clean
    if scheduler.config.prediction_type == "epsilon":
        return noise
    return scheduler.get_velocity(clean, noise, timesteps)


def loss_weights(
    scheduler: CosineLatentScheduler, timesteps: torch.Tensor, snr_gamma: float | None, kind: str = "min"
) -> torch.Tensor:
    """Return loss weights [batch] that bound the weight of the cleanest levels; ones if `snr_gamma` is None.

    With respect to the error of the clean latent they are `min(SNR, gamma)` (min-SNR: Hang et al.,
    https://arxiv.org/abs/2303.09556, section 3.4) or, with `kind="soft_min"`, `SNR gamma / (SNR + gamma)` (Crowson et
    al., https://arxiv.org/abs/2401.11605).
    """
    if snr_gamma is None:
        return torch.ones_like(timesteps)
    alpha, sigma = scheduler.levels(timesteps)  # each [batch]
    snr = (alpha / sigma).square()
    # The squared error of v is SNR + 1 times that of the clean latent which it implies, that of the noise SNR times.
    divisors = {"sample": torch.ones_like(snr), "v_prediction": snr + 1, "epsilon": snr}
    bounded = snr.clamp(max=snr_gamma) if kind == "min" else snr * snr_gamma / (snr + snr_gamma)
    return bounded / divisors[scheduler.config.prediction_type]


def losses(
    prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor, kind: str, huber_c: float = 0.1
) -> torch.Tensor:
    """Return the weighted mean error of each latent, float32 [batch].

    Args:
        prediction: [batch, channels, height, width].
        target: The same shape.
        weights: [batch].
        kind: `l1`, `l2`, or `huber`, the pseudo-Huber loss `2 c (sqrt(error² + c²) - c)`: L2 for errors well below c,
            `2 c` times L1 well above.
        huber_c: c of the pseudo-Huber loss.
    """
    # In float32 even where the model computes in half precision: squares of small errors would underflow.
    prediction, target = prediction.float(), target.float()
    if kind == "huber":
        error = 2 * huber_c * (((prediction - target).square() + huber_c**2).sqrt() - huber_c)
    else:
        error = (F.l1_loss if kind == "l1" else F.mse_loss)(prediction, target, reduction="none")
    return weights * error.mean(dim=(1, 2, 3))
