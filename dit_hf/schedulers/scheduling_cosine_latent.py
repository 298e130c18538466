# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.
"""The cosine noise schedule (Nichol & Dhariwal, https://arxiv.org/abs/2102.09672), by DPM-Solver++ or DDIM."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

MAX_BETA = 0.999


@dataclass
class CosineLatentSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample: The sample one step nearer to the clean latent, the shape of the input.
        pred_original_sample: The clean latent as predicted at this step, the same shape.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class CosineLatentScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Timestep `t` in [0, T - 1], fractions allowed, is the noise level `u = (t + 1) / T` of the cosine schedule
    `alpha_bar(u) = cos^2((u + s) / (1 + s) * pi / 2) / cos^2(s / (1 + s) * pi / 2)` (Nichol & Dhariwal, eq. 17), with
    betas capped at 0.999 so that no level is pure noise. `t = 0` is the cleanest level that is trained.

    The config always carries `trained_betas` and the keys stock schedulers need, so that
    `DPMSolverMultistepScheduler.from_config(scheduler.config)` samples the same model; so do DDIM, UniPC, DEIS and
    Euler, and Heun with `use_exponential_sigmas=True`.

    Args:
        num_train_timesteps: T, the number of levels.
        cosine_s: s, the offset that keeps the first levels from being too clean.
        prediction_type: What the model predicts: `"sample"` (the clean latent), `"epsilon"` (the noise) or
            `"v_prediction"` (Salimans & Ho, https://arxiv.org/abs/2202.00512, section 4).
        trained_betas: The T betas of another schedule, to use instead of the cosine.
        clip_sample: Must be False: latents have no range to clip to.
        set_alpha_to_one: Must be True: the last step ends on the clean latent.
        timestep_spacing: Must be `"trailing"`: sampling begins at the noisiest level.
        steps_offset: Must be 0.
        multistep: True for DPM-Solver++ (2M), False for DDIM, which needs many more steps to end as near.

    Raises:
        ValueError: for an unknown `prediction_type`, betas that are not T numbers in (0, 1), or other fixed values.
    """

    _compatibles = [
        "DDIMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "UniPCMultistepScheduler",
    ]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 500,
        cosine_s: float = 0.008,
        prediction_type: str = "sample",
        trained_betas: list[float] | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        timestep_spacing: str = "trailing",
        steps_offset: int = 0,
        multistep: bool = True,
    ):
        if prediction_type not in ("sample", "epsilon", "v_prediction"):
            raise ValueError(f"prediction_type={prediction_type!r}; known are sample, epsilon, v_prediction")
        if clip_sample or not set_alpha_to_one or timestep_spacing != "trailing" or steps_offset:
            raise ValueError(
                "CosineLatentScheduler needs clip_sample=False, set_alpha_to_one=True, timestep_spacing='trailing' "
                "and steps_offset=0"
            )
        if trained_betas is None:
            trained_betas = cosine_betas(num_train_timesteps, cosine_s)
        # Keys noted as left at their default would be dropped when another class is made from this config.
        self.register_to_config(trained_betas=list(trained_betas), _use_default_values=[])
        self.betas = torch.tensor(trained_betas, dtype=torch.float32)
        if self.betas.shape != (num_train_timesteps,) or not ((self.betas > 0) & (self.betas < 1)).all():
            raise ValueError(f"trained_betas must be {num_train_timesteps} numbers between 0 and 1")
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        # Entry i + 1 of both tables is level i; entry 0 is the clean latent.
        clean = torch.ones(1)
        self._alphas = torch.cat([clean, self.alphas_cumprod]).sqrt()
        self._sigmas = torch.cat([1 - clean, 1 - self.alphas_cumprod]).sqrt()
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Spread `num_inference_steps` evenly from the noisiest level down ("trailing", https://arxiv.org/abs/2305.08891).

        Where the number does not divide T the timesteps are fractions, so the spacing stays even.

        Raises:
            ValueError: if it is not between 1 and T.
        """
        total = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= total:
            raise ValueError(f"num_inference_steps={num_inference_steps} must be between 1 and {total}")
        self.num_inference_steps = num_inference_steps
        steps = torch.arange(num_inference_steps + 1, dtype=torch.float64)
        schedule = (total - steps * total / num_inference_steps - 1).float()
        self.timesteps = schedule[:-1].to(device)
        # For `step`: the timesteps with the clean latent, -1, at their end; h / (2 h_last) of each, h being a step's
        # length in log(alpha / sigma), 0 where it is of the first order; and of the step before its place and the
        # clean latent predicted there.
        alpha, sigma = self.levels(schedule[:-1])
        lengths = (alpha.log() - sigma.log()).diff()
        momenta = torch.zeros(num_inference_steps)
        momenta[1:-1] = lengths[1:] / (2 * lengths[:-1])
        self._schedule, self._momenta = schedule.to(device), momenta.to(device)
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | float | None = None) -> torch.Tensor:
        """The input as it is: this schedule preserves the variance."""
        return sample

    def levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`alpha` and `sigma` (the square roots of alpha_bar and 1 - alpha_bar) at `timesteps` of any shape, float32.

        Between two levels the angle of (alpha, sigma) is interpolated, which on the cosine schedule is exact up to
        the chord's third order; -1 is the clean latent.
        """
        if self._alphas.device != timesteps.device:  # moved once, so that no step waits for a copy
            self._alphas, self._sigmas = self._alphas.to(timesteps.device), self._sigmas.to(timesteps.device)
        position = timesteps.to(torch.float32).clamp(-1, self.config.num_train_timesteps - 1) + 1
        low = position.floor()
        weight = position - low
        low, high = low.long(), position.ceil().long()
        # `take`, because indexing by a tensor of no dimension would wait for its value.
        alpha = torch.lerp(self._alphas.take(low), self._alphas.take(high), weight)
        sigma = torch.lerp(self._sigmas.take(low), self._sigmas.take(high), weight)
        norm = torch.where(weight > 0, torch.hypot(alpha, sigma), torch.ones_like(alpha))
        return alpha / norm, sigma / norm

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy latents `alpha x0 + sigma noise` at `timesteps` [batch] (or one for all)."""
        alpha, sigma = self._broadcast_levels(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The velocity `v = alpha noise - sigma x0` that a v-prediction model learns."""
        alpha, sigma = self._broadcast_levels(timesteps, sample)
        return alpha * noise - sigma * sample

    def predict_original_sample(
        self, model_output: torch.Tensor, timesteps: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """The clean latent that `model_output` at noisy `sample` stands for, by the config's `prediction_type`."""
        return self._predictions(model_output, sample, *self._broadcast_levels(timesteps, sample))[0]

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> CosineLatentSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step to the next of `timesteps`.

        With `multistep` and no `eta` it is DPM-Solver++ (2M) (Lu et al., https://arxiv.org/abs/2211.01095,
        algorithm 2): DDIM towards the clean latent that this prediction and the last one, extrapolated over the
        logarithm of the signal-to-noise ratio, lead to. Where the last call was not at the timestep before this one,
        and where the step ends on the clean latent, it is the first order: DDIM (Song et al.,
        https://arxiv.org/abs/2010.02502, eq. 12 and 16), as without `multistep` throughout.

        Args:
            model_output: What the model predicted, the shape of `sample`.
            timestep: The current one of `timesteps`.
            sample: The noisy latents.
            eta: 0 is deterministic, 1 is as noisy as DDPM (and first order).
            generator: For the noise when `eta` is above 0.
            variance_noise: That noise itself, instead of a generator.
            return_dict: False for the tuple `(prev_sample, pred_original_sample)`.

        Raises:
            ValueError: before `set_timesteps`, or for an `eta` outside [0, 1].
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} must be between 0 and 1")
        place, previous = self._places(timestep, sample.device)
        timestep = torch.as_tensor(timestep, device=sample.device, dtype=torch.float32)

        # 1. The clean latent and the noise that the prediction stands for.
        alpha, sigma = self._broadcast_levels(timestep, sample)
        original, noise = self._predictions(model_output, sample, alpha, sigma)
        # 2. The second order: the clean latent as it will have been predicted halfway, and the noise that fits it.
        last, self._last = self._last, (place, original)
        if self.config.multistep and eta == 0 and last is not None and last[1].shape == sample.shape:
            momentum = torch.where(last[0] == place - 1, self._momenta.take(place), 0.0)
            aim = original + momentum.to(sample.dtype) * (original - last[1])
            noise = (sample - alpha * aim) / sigma
        else:
            aim = original
        # 3. Back to the previous level, part of the noise fresh where eta asks for it.
        alpha_prev, sigma_prev = self._broadcast_levels(previous, sample)
        if eta > 0:
            ratio = (alpha / alpha_prev).square()
            fresh = eta * (sigma_prev / sigma) * (1 - ratio).clamp(min=0).sqrt()
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator, device=sample.device, dtype=sample.dtype)
            kept = (sigma_prev.square() - fresh.square()).clamp(min=0).sqrt()
            prev_sample = alpha_prev * original + kept * noise + fresh * variance_noise
        else:
            prev_sample = alpha_prev * aim + sigma_prev * noise
        if not return_dict:
            return prev_sample, original
        return CosineLatentSchedulerOutput(prev_sample=prev_sample, pred_original_sample=original)

    def reverse_step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        prev_sample: torch.Tensor,
    ) -> torch.Tensor:
        """The noisier sample at `timestep` from which a deterministic `step` leads to `prev_sample`.

        Exactly so if the model predicts `model_output` there. It was predicted at `sample`: calling both again with
        what this returns converges on the sample for which it holds. With (alpha, sigma) as a point at angle phi of
        the circle and v the velocity, a step is `x' = x cos(d) - v sin(d)` for the d between both angles, which is
        solved for x.

        Args:
            model_output: What the model predicted for `sample` at `timestep`.
            timestep: One of `timesteps`, the level to go to.
            sample: Near what is sought; `prev_sample` at first.
            prev_sample: The sample at the next lower of `timesteps` (the clean latent below the last).

        Raises:
            ValueError: before `set_timesteps`.
        """
        alpha, sigma = self._broadcast_levels(torch.as_tensor(timestep, dtype=torch.float32), sample)
        alpha_prev, sigma_prev = self._broadcast_levels(self._places(timestep, sample.device)[1], sample)
        original, noise = self._predictions(model_output, sample, alpha, sigma)
        velocity = alpha * noise - sigma * original
        sine, cosine = sigma * alpha_prev - alpha * sigma_prev, alpha * alpha_prev + sigma * sigma_prev
        return (prev_sample + velocity * sine) / cosine

    def _places(self, timestep: torch.Tensor | float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Where in `timesteps` a step is, and the next lower one, -1 below the last; on the device, nothing waits.

        A step is found by its timestep, so that a loop may begin anywhere.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        if self._schedule.device != device:
            self._schedule, self._momenta = self._schedule.to(device), self._momenta.to(device)
        place = (self._schedule[:-1] - torch.as_tensor(timestep, device=device)).abs().argmin()
        return place, self._schedule.take(place + 1)

    def _predictions(
        self, model_output: torch.Tensor, sample: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The clean latent and the noise, each by the formula that divides by nothing small where there is one."""
        if self.config.prediction_type == "sample":
            return model_output, (sample - alpha * model_output) / sigma
        if self.config.prediction_type == "epsilon":
            return (sample - sigma * model_output) / alpha, model_output
        return alpha * sample - sigma * model_output, alpha * model_output + sigma * sample

    def _broadcast_levels(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = self.levels(timesteps.to(like.device))
        shape = alpha.shape + (1,) * (like.ndim - alpha.ndim) if alpha.ndim else alpha.shape
        return alpha.reshape(shape).to(like.dtype), sigma.reshape(shape).to(like.dtype)


def cosine_betas(num_train_timesteps: int, cosine_s: float = 0.008) -> list[float]:
    """Betas of the cosine schedule, `1 - alpha_bar((i + 1) / T) / alpha_bar(i / T)`, capped at 0.999."""

    def alpha_bar(u: float) -> float:
        return math.cos((u + cosine_s) / (1 + cosine_s) * math.pi / 2) ** 2

    total = num_train_timesteps
    return [min(1 - alpha_bar((i + 1) / total) / alpha_bar(i / total), MAX_BETA) for i in range(total)]
