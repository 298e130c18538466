# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.
"""The cosine noise schedule (Nichol & Dhariwal, https://arxiv.org/abs/2102.09672), sampled by DPM-Solver++ or DDIM."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..short_card import SCHEDULER_CARD, ShortCardMixin

MAX_BETA = 0.999  # keeps the noisiest level from being pure noise, at which alpha, a divisor, would be 0


@dataclass
class CosineLatentSchedulerOutput(BaseOutput):
    """
    Output of [`CosineLatentScheduler.step`].

    Args:
        prev_sample: The sample one step nearer to the clean latent, the shape of the input.
        pred_original_sample: The clean latent as predicted at this step, the same shape.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class CosineLatentScheduler(ShortCardMixin, SchedulerMixin, ConfigMixin):
    r"""
    The cosine noise schedule for any number of steps, by DPM-Solver++ (2M) or DDIM.

    Timestep `t` in [0, T - 1], fractions allowed, is the noise level `u = (t + 1) / T` of the cosine schedule
    `alpha_bar(u) = cos^2((u + s) / (1 + s) * pi / 2) / cos^2(s / (1 + s) * pi / 2)` (Nichol & Dhariwal, eq. 17), with
    betas capped at 0.999 so that no level is pure noise. `t = 0` is the cleanest level that is trained.

    The config always carries `trained_betas` and the keys that stock schedulers need, so that
    `DPMSolverMultistepScheduler.from_config(scheduler.config)` samples the same model. So do DDIM, UniPC, DEIS and
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
        multistep: True for DPM-Solver++ (2M), False for DDIM, which needs many more steps for the same accuracy.

    Raises:
        ValueError: for less than one timestep, an unknown `prediction_type`, betas that are not T numbers in (0, 1),
            or another value of an argument that must have a certain one.
    """

    _card = SCHEDULER_CARD
    # SchedulerMixin of diffusers 0.42.1 reads this as the classes that `compatibles` offers.
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
        # 1. Check the arguments.
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps={num_train_timesteps} must be at least 1")
        if prediction_type not in ("sample", "epsilon", "v_prediction"):
            raise ValueError(f"expected prediction_type sample, epsilon or v_prediction, got {prediction_type!r}")
        if clip_sample or not set_alpha_to_one or timestep_spacing != "trailing" or steps_offset:
            raise ValueError(
                "CosineLatentScheduler needs clip_sample=False, set_alpha_to_one=True, timestep_spacing='trailing' "
                "and steps_offset=0"
            )

        # 2. The betas, which always go into the config, where stock schedulers find them.
        if trained_betas is None:
            trained_betas = cosine_betas(num_train_timesteps, cosine_s)
        # `from_config` of diffusers 0.42.1 drops the keys in `_use_default_values` when it makes another class.
        self.register_to_config(trained_betas=list(trained_betas), _use_default_values=[])
        self.betas = torch.tensor(trained_betas, dtype=torch.float32)
        if self.betas.shape != (num_train_timesteps,) or not ((self.betas > 0) & (self.betas < 1)).all():
            raise ValueError(f"trained_betas must be {num_train_timesteps} numbers between 0 and 1")

        # 3. The tables of the levels.
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        # Entry i + 1 of both is level i; entry 0 is the clean latent, on which the last step ends.
        clean = torch.ones(1)
        self._alphas = torch.cat([clean, self.alphas_cumprod]).sqrt()
        self._sigmas = torch.cat([1 - clean, 1 - self.alphas_cumprod]).sqrt()

        # 4. The attributes that pipelines of diffusers read.
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Spread the steps evenly from the noisiest level down ("trailing", https://arxiv.org/abs/2305.08891).

        Args:
            num_inference_steps: The number of steps. If it does not divide T, the timesteps are fractions, which keeps
                the spacing even.
            device: Where `timesteps` goes; `step` is fastest if it is the device of the samples.

        Raises:
            ValueError: if `num_inference_steps` is not between 1 and T.
        """
        total = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= total or num_inference_steps != int(num_inference_steps):
            raise ValueError(f"num_inference_steps={num_inference_steps} must be a whole number between 1 and {total}")
        self.num_inference_steps = num_inference_steps

        # 1. The timesteps, computed in float64 and rounded once.
        steps = torch.arange(num_inference_steps + 1, dtype=torch.float64)
        schedule = (total - steps * total / num_inference_steps - 1).float()  # [num_inference_steps + 1], ends on -1
        self._schedule = schedule.to(device)
        self.timesteps = schedule[:-1].to(device)  # [num_inference_steps], without -1, the clean latent

        # 2. The weight with which each step extrapolates from the previous prediction: h / (2 h_previous), where h is
        #    a step's length in log(alpha / sigma); 1 / (2 r) in the paper. It stays 0, the first order, for the first
        #    step, which has no previous prediction, and for the last, whose length is infinite.
        alpha, sigma = self.levels(schedule[:-1])
        lengths = (alpha.log() - sigma.log()).diff()  # [num_inference_steps - 1], without the last step's
        extrapolation = torch.zeros(num_inference_steps)
        extrapolation[1:-1] = lengths[1:] / (2 * lengths[:-1])
        self._extrapolation = extrapolation.to(device)

        # 3. The index of the previous step and the clean latent that it predicted: none yet.
        self._previous: tuple[torch.Tensor, torch.Tensor] | None = None

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | float | None = None) -> torch.Tensor:
        """Return the input as it is, because this schedule preserves the variance."""
        return sample

    def levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `alpha` and `sigma`, the square roots of alpha_bar and 1 - alpha_bar, at `timesteps`.

        Between two levels the chord of the circle on which (alpha, sigma) lies is interpolated and projected back to
        the circle. On the cosine schedule that is exact up to the third order in the chord.

        Args:
            timesteps: Of any shape, fractions allowed; -1 is the clean latent.

        Returns:
            Two tensors of the shape and device of `timesteps`, float32.
        """
        # The tables are moved once, so that no later step waits for a copy.
        if self._alphas.device != timesteps.device:
            self._alphas = self._alphas.to(timesteps.device)
            self._sigmas = self._sigmas.to(timesteps.device)

        # 1. The two levels around each timestep.
        position = timesteps.to(torch.float32).clamp(-1, self.config.num_train_timesteps - 1) + 1
        low = position.floor()
        weight = position - low
        low, high = low.long(), position.ceil().long()
        # 2. The point between them: `take`, because indexing by a 0-d tensor would make the CPU wait for its value.
        alpha = torch.lerp(self._alphas.take(low), self._alphas.take(high), weight)
        sigma = torch.lerp(self._sigmas.take(low), self._sigmas.take(high), weight)
        # 3. Back to the circle; entries of the table are returned as they are, bit for bit.
        norm = torch.where(weight > 0, torch.hypot(alpha, sigma), torch.ones_like(alpha))
        return alpha / norm, sigma / norm

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return noisy latents `alpha x0 + sigma noise` at `timesteps`, [batch] or one for all."""
        alpha, sigma = self._broadcast_levels(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the velocity `v = alpha noise - sigma x0`, the target of v-prediction."""
        alpha, sigma = self._broadcast_levels(timesteps, sample)
        return alpha * noise - sigma * sample

    def predict_original_sample(
        self, model_output: torch.Tensor, timesteps: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Return the clean latent that `model_output` at noisy `sample` implies by the config's `prediction_type`."""
        alpha, sigma = self._broadcast_levels(timesteps, sample)
        original, _ = self._predictions(model_output, sample, alpha, sigma)
        return original

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
        """Denoise `sample` by one step, from `timestep` to the next of `timesteps`.

        The step is DDIM (Song et al., https://arxiv.org/abs/2010.02502, eq. 12 and 16). With `multistep` and no `eta`
        it is of the second order, DPM-Solver++ (2M) (Lu et al., https://arxiv.org/abs/2211.01095, algorithm 2): DDIM
        towards a clean latent that is extrapolated, over the logarithm of the signal-to-noise ratio, from this
        prediction and the previous one. It falls back to the first order if the previous call was not at the timestep
        before this one, and if the step ends on the clean latent.

        Args:
            model_output: The model's prediction, the shape of `sample`.
            timestep: The current one of `timesteps`.
            sample: The noisy latents.
            eta: 0 is deterministic, 1 is as noisy as DDPM (and of the first order).
            generator: Samples the noise if `eta` is above 0.
            variance_noise: That noise itself, instead of a generator.
            return_dict: False returns the tuple `(prev_sample, pred_original_sample)`.

        Raises:
            ValueError: before `set_timesteps`, or for an `eta` outside [0, 1].
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} must be between 0 and 1")
        index, next_timestep = self._find_step(timestep, sample.device)
        timestep = torch.as_tensor(timestep, device=sample.device, dtype=torch.float32)

        # 1. The clean latent and the noise that the prediction implies.
        alpha, sigma = self._broadcast_levels(timestep, sample)
        original, noise = self._predictions(model_output, sample, alpha, sigma)

        # 2. Second order: extrapolate the clean latent to the middle of the step, and take the noise that fits it.
        previous = self._previous
        self._previous = (index, original)
        target = original
        if self.config.multistep and eta == 0 and previous is not None and previous[1].shape == sample.shape:
            previous_index, previous_original = previous
            # On the device, because a Python `if` on the index would wait for its value.
            weight = torch.where(previous_index == index - 1, self._extrapolation.take(index), 0.0)
            target = original + weight.to(sample.dtype) * (original - previous_original)
            noise = (sample - alpha * target) / sigma

        # 3. Combine both at the next level; with eta a part of the noise is fresh.
        alpha_prev, sigma_prev = self._broadcast_levels(next_timestep, sample)
        if eta > 0:
            ratio = (alpha / alpha_prev).square()
            fresh = eta * (sigma_prev / sigma) * (1 - ratio).clamp(min=0).sqrt()  # eq. 16
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator, device=sample.device, dtype=sample.dtype)
            remaining = (sigma_prev.square() - fresh.square()).clamp(min=0).sqrt()
            prev_sample = alpha_prev * original + remaining * noise + fresh * variance_noise  # eq. 12
        else:
            prev_sample = alpha_prev * target + sigma_prev * noise
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
        """Return the noisier sample at `timestep` from which a deterministic DDIM step leads to `prev_sample`.

        The result is exact if the model predicts `model_output` there. But it was predicted at `sample`: to converge
        on the exact sample, predict again at the result and call this again. With (alpha, sigma) a point on the circle
        and v the velocity, a step is `x' = x cos(d) - v sin(d)`, d being the angle between the two levels; it is
        solved for x.

        Args:
            model_output: The model's prediction for `sample` at `timestep`.
            timestep: One of `timesteps`, the level to go to.
            sample: An estimate of the result; `prev_sample` at first.
            prev_sample: The sample at the next lower of `timesteps` (the clean latent below the last).

        Raises:
            ValueError: before `set_timesteps`.
        """
        # 1. The two levels.
        alpha, sigma = self._broadcast_levels(torch.as_tensor(timestep, dtype=torch.float32), sample)
        _, next_timestep = self._find_step(timestep, sample.device)
        alpha_prev, sigma_prev = self._broadcast_levels(next_timestep, sample)

        # 2. The velocity, from whatever the model predicts.
        original, noise = self._predictions(model_output, sample, alpha, sigma)
        velocity = alpha * noise - sigma * original

        # 3. Solve the step, with the sine and cosine of the difference of both angles.
        sine = sigma * alpha_prev - alpha * sigma_prev
        cosine = alpha * alpha_prev + sigma * sigma_prev
        return (prev_sample + velocity * sine) / cosine

    def _find_step(self, timestep: torch.Tensor | float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the index of `timestep` in `timesteps` and the timestep after it, -1 after the last.

        The index is looked up and not counted, so that a loop may begin anywhere and go back. Both are 0-d tensors on
        the device, so that the CPU does not wait for them.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        if self._schedule.device != device:
            self._schedule = self._schedule.to(device)
            self._extrapolation = self._extrapolation.to(device)
        # The nearest one instead of an equal one, so that a timestep rounded by another precision is found too.
        index = (self._schedule[:-1] - torch.as_tensor(timestep, device=device)).abs().argmin()
        return index, self._schedule.take(index + 1)

    def _predictions(
        self, model_output: torch.Tensor, sample: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the clean latent and the noise that `model_output` implies.

        Each formula avoids a division where it can: sigma is small at the cleanest levels, alpha at the noisiest.
        """
        if self.config.prediction_type == "sample":
            return model_output, (sample - alpha * model_output) / sigma
        if self.config.prediction_type == "epsilon":
            return (sample - sigma * model_output) / alpha, model_output
        return alpha * sample - sigma * model_output, alpha * model_output + sigma * sample

    def _broadcast_levels(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `alpha` and `sigma` at `timesteps`, shaped to broadcast over `like` and in its precision."""
        alpha, sigma = self.levels(timesteps.to(like.device))
        shape = alpha.shape + (1,) * (like.ndim - alpha.ndim) if alpha.ndim else alpha.shape
        return alpha.reshape(shape).to(like.dtype), sigma.reshape(shape).to(like.dtype)


def cosine_betas(num_train_timesteps: int, cosine_s: float = 0.008) -> list[float]:
    """Return the betas of the cosine schedule, `1 - alpha_bar((i + 1) / T) / alpha_bar(i / T)`, capped at 0.999."""

    # Without the constant denominator of eq. 17, which the ratio cancels.
    def alpha_bar(u: float) -> float:
        return math.cos((u + cosine_s) / (1 + cosine_s) * math.pi / 2) ** 2

    total = num_train_timesteps
    return [min(1 - alpha_bar((i + 1) / total) / alpha_bar(i / total), MAX_BETA) for i in range(total)]


def named_betas(beta_schedule: str, num_train_timesteps: int) -> list[float]:
    """Return betas by diffusers' names: `squaredcos_cap_v2`, the cosine schedule, or `linear`, from 0.0001 to 0.02.

    With 1,000 timesteps the linear ones are those of Ho et al. (https://arxiv.org/abs/2006.11239), with which
    published DiTs are trained.
    """
    if beta_schedule == "linear":
        return torch.linspace(1e-4, 0.02, num_train_timesteps, dtype=torch.float64).tolist()
    return cosine_betas(num_train_timesteps)
