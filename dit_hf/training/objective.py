"""What a step draws, what the model is to predict from it, and how far off it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..schedulers.scheduling_cosine_latent import CosineLatentScheduler
from .config import ObjectiveConfig

NOISE_LEVELS = 10


@dataclass
class Draws:
    """The random numbers of a step, for the whole global batch or a slice of it.

    Args:
        timesteps: float32 [batch], whole numbers 0 … T - 1, uniform.
        noise: float32 [batch, channels, height, width], unit normal; what is added to the latents.
        posterior_noise: The same shape; picks the sample of the VAE's posterior.
        keep: bool [batch, conditions]; False where a condition is trained as not given.
    """

    timesteps: torch.Tensor
    noise: torch.Tensor
    posterior_noise: torch.Tensor
    keep: torch.Tensor

    def __getitem__(self, part: slice) -> Draws:
        return Draws(self.timesteps[part], self.noise[part], self.posterior_noise[part], self.keep[part])


def draw(
    config: ObjectiveConfig,
    seed: int,
    step: int,
    latents_shape: tuple[int, ...],
    num_conditions: int,
    device: torch.device,
) -> Draws:
    """Draw for one step: a pure function of (seed, step) for the whole batch `latents_shape` [batch, c, h, w]."""
    generator = torch.Generator(device).manual_seed(step_seed(seed, step))
    batch = latents_shape[0]
    timesteps = torch.randint(config.num_train_timesteps, (batch,), generator=generator, device=device).float()
    noise = torch.randn(latents_shape, generator=generator, device=device)
    posterior_noise = torch.randn(latents_shape, generator=generator, device=device)
    # One picture in 1/p keeps no condition, one in 1/p keeps each with a probability of its own, the others keep all.
    kind = torch.rand((batch, 1), generator=generator, device=device)
    share = torch.rand((batch, 1), generator=generator, device=device)
    each = torch.rand((batch, num_conditions), generator=generator, device=device)
    p = config.condition_dropout
    keep = (kind >= 2 * p) | ((kind >= p) & (each < share))
    return Draws(timesteps, noise, posterior_noise, keep)


def draw_flips(seed: int, step: int, batch: int) -> np.ndarray:
    """Which pictures of a step's global batch are read mirrored, bool [batch]."""
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
    if scheduler.config.prediction_type == "epsilon":
        return noise
    return scheduler.get_velocity(clean, noise, timesteps)


def loss_weights(scheduler: CosineLatentScheduler, timesteps: torch.Tensor, snr_gamma: float | None) -> torch.Tensor:
    """Min-SNR weights [batch] (Hang et al., https://arxiv.org/abs/2303.09556, section 3.4); ones without a gamma.

    `min(SNR, gamma)` on the error of the clean latent, divided by what turns that error into the prediction's own.
    """
    if snr_gamma is None:
        return torch.ones_like(timesteps)
    alpha, sigma = scheduler.levels(timesteps)
    snr = (alpha / sigma).square()
    divisors = {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1}
    divisor = divisors[scheduler.config.prediction_type]
    return snr.clamp(max=snr_gamma) / divisor


def losses(prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor, kind: str) -> torch.Tensor:
    """Weighted mean error of each latent, float32 [batch]; `kind` is `l1` or `l2`."""
    error = (F.l1_loss if kind == "l1" else F.mse_loss)(prediction.float(), target.float(), reduction="none")
    return weights * error.mean(dim=(1, 2, 3))
