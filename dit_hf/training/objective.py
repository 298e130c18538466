"""What a step draws, what the model is to predict from it, and how far off it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..config import ObjectiveConfig
from ..schedulers.scheduling_cosine_latent import CosineLatentScheduler

NOISE_LEVELS = 10


@dataclass
class StepRandomness:
    """The random numbers of a step, for the whole global batch or a slice of it.

    Args:
        timesteps: float32 [batch], whole numbers 0 … T - 1.
        noise: float32 [batch, channels, height, width], unit normal; what is added to the latents.
        posterior_noise: The same shape; picks the sample of the VAE's posterior.
        keep: bool [batch, conditions]; False where a condition is trained as not given.
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
    """Draw for one step: a pure function of (seed, step) for the whole batch `latents_shape` [batch, c, h, w]."""
    generator = torch.Generator(device).manual_seed(step_seed(seed, step))
    batch = latents_shape[0]
    timesteps = sample_timesteps(config, batch, generator, device)
    noise = torch.randn(latents_shape, generator=generator, device=device)
    posterior_noise = torch.randn(latents_shape, generator=generator, device=device)
    # One image in 1/p keeps no condition, one in 1/p keeps each with a probability of its own, the others keep all.
    kind = torch.rand((batch, 1), generator=generator, device=device)
    share = torch.rand((batch, 1), generator=generator, device=device)
    each = torch.rand((batch, num_conditions), generator=generator, device=device)
    p = config.condition_dropout
    keep = (kind >= 2 * p) | ((kind >= p) & (each < share))
    return StepRandomness(timesteps, noise, posterior_noise, keep)


def sample_timesteps(
    config: ObjectiveConfig, batch: int, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """Timesteps of `batch` images, float32 [batch], by the recipe's density.

    `logit_normal` draws the ratio of noise to signal, `sigma / alpha`, log-normal: the noise levels that flow
    matching with logit-normal times trains (Esser et al., https://arxiv.org/abs/2403.03206, section 3.1), whose
    `t / (1 - t)` is that ratio.
    """
    total = config.num_train_timesteps
    if config.timestep_sampling == "uniform":
        return torch.randint(total, (batch,), generator=generator, device=device).float()
    normal = torch.randn(batch, generator=generator, device=device)
    angle = (config.logit_mean + config.logit_std * normal).exp().atan()
    return (angle * (2 / math.pi) * total).floor().clamp(max=total - 1)


def sample_flips(seed: int, step: int, batch: int) -> np.ndarray:
    """Which images of a step's global batch are read mirrored, bool [batch]."""
    return np.random.default_rng([seed, step, 1]).random(batch) < 0.5


def step_seed(seed: int, step: int) -> int:
    """A 63-bit seed that is well mixed for neighbouring seeds and steps."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


def noise_level(timesteps: torch.Tensor, num_train_timesteps: int) -> torch.Tensor:
    """Which tenth of the schedule each timestep is in, float32 one-hot [batch, NOISE_LEVELS].

    As a matrix, so that sums by level are products, which are deterministic on a GPU.
    """
    levels = (timesteps * NOISE_LEVELS / num_train_timesteps).long()
    return F.one_hot(levels, NOISE_LEVELS).float()


def training_target(
    scheduler: CosineLatentScheduler, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the model is to predict, by the scheduler's `prediction_type`; the shape of `clean`."""
    if scheduler.config.prediction_type == "sample":
        return clean
    return scheduler.get_velocity(clean, noise, timesteps)


def loss_weights(
    scheduler: CosineLatentScheduler, timesteps: torch.Tensor, snr_gamma: float | None, kind: str = "min"
) -> torch.Tensor:
    """Weights [batch] that bound what clean levels count for; ones without a gamma.

    On the error of the clean latent they are `min(SNR, gamma)` (min-SNR: Hang et al., https://arxiv.org/abs/2303.09556,
    section 3.4) or, with `kind` soft_min, `SNR gamma / (SNR + gamma)` (Crowson et al.,
    https://arxiv.org/abs/2401.11605), divided by what turns that error into the prediction's own.
    """
    if snr_gamma is None:
        return torch.ones_like(timesteps)
    alpha, sigma = scheduler.levels(timesteps)
    snr = (alpha / sigma).square()
    divisors = {"sample": torch.ones_like(snr), "v_prediction": snr + 1}
    bounded = snr.clamp(max=snr_gamma) if kind == "min" else snr * snr_gamma / (snr + snr_gamma)
    return bounded / divisors[scheduler.config.prediction_type]


def losses(
    prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor, kind: str, huber_c: float = 0.1
) -> torch.Tensor:
    """Weighted mean error of each latent, float32 [batch]; `kind` is `l1`, `l2` or `huber`.

    The pseudo-Huber loss is `2 c (sqrt(error² + c²) - c)`: L2 for errors well below c, `2 c` times L1 well above.
    """
    prediction, target = prediction.float(), target.float()
    if kind == "huber":
        error = 2 * huber_c * (((prediction - target).square() + huber_c**2).sqrt() - huber_c)
    else:
        error = (F.l1_loss if kind == "l1" else F.mse_loss)(prediction, target, reduction="none")
    return weights * error.mean(dim=(1, 2, 3))
