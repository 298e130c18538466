"""One optimizer step: read, sample random numbers, forward, backward, clip, update, EMA."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication

from ..config import Config
from ..latents.reader import BatchPrefetcher, LatentReader
from ..models.transformer_latent_dit import LatentDiTTransformer2DModel
from ..runs import Normalization, build_scheduler
from .ema import EMA
from .objective import (
    NOISE_LEVELS,
    StepRandomness,
    loss_weights,
    losses,
    noise_level,
    sample_flips,
    sample_step_randomness,
    training_target,
)
from .optimizer import build_optimizer, learning_rate


class TrainingStep:
    """A model in training and its optimizer step; the same numbers for any number of ranks.

    Args:
        config: The recipe.
        reader: Of the training images.
        accelerator: Prepares model and optimizer for its devices.
        transformer: The model, on the device; sharded in place under FSDP2.
        normalization: Mean and standard deviation by channel of the latents.

    Attributes:
        window: float32 [2, NOISE_LEVELS]: sum of the losses and number of images by noise level, of this rank since
            the last row of the log.
        first_skipped: int64 []: the first step in that window whose gradient was not finite, or -1.

    Raises:
        ValueError: if the global batch is not divisible by the ranks and accumulation steps.
    """

    def __init__(
        self,
        config: Config,
        reader: LatentReader,
        accelerator: Accelerator,
        transformer: LatentDiTTransformer2DModel,
        normalization: Normalization,
    ):
        self.config, self.reader, self.accelerator, self.transformer = config, reader, accelerator, transformer
        self.device = accelerator.device

        # The batch: every micro-batch of every rank has the same size, so that its mean counts the same.
        train, ranks = config.train, accelerator.num_processes
        if train.global_batch_size % (ranks * train.gradient_accumulation_steps):
            raise ValueError(
                f"train.global_batch_size={train.global_batch_size} must be divisible by the number of ranks times "
                f"train.gradient_accumulation_steps, {ranks} x {train.gradient_accumulation_steps}"
            )
        self.micro_batch_size = train.global_batch_size // (ranks * train.gradient_accumulation_steps)
        self.batches = BatchPrefetcher(self._read, self.device)

        # The objective.
        self.scheduler = build_scheduler(config.objective)
        self.mean, self.std = (torch.tensor(v, device=self.device).view(1, -1, 1, 1) for v in normalization)

        # Model and optimizer. The optimizer is built from the plain model: in `prepare`, FSDP2 replaces the parameters
        # by shards and accelerate those in the optimizer's groups.
        self.optimizer, self.optimizer_name = build_optimizer(
            transformer, config.optim, self.device, accelerator.mixed_precision, accelerator.is_fsdp2
        )
        self.model, self.prepared_optimizer = accelerator.prepare(transformer, self.optimizer)

        # EMAs, by the name of their file; built after `prepare`, because they hold on to the (sharded) parameters.
        decays = {"ema": config.optim.ema_decay}
        decays |= {f"ema-{decay:g}": decay for decay in config.optim.extra_ema_decays}
        self.emas = {name: EMA(self.model, decay) for name, decay in decays.items()}

        # Sums stay on the device until a row of the log needs them.
        self.window = torch.zeros(2, NOISE_LEVELS, device=self.device)
        self.first_skipped = torch.full((), -1, device=self.device)

    def __call__(self, step: int) -> torch.Tensor:
        """Take optimizer step `step` (from 0) and return the gradient's norm, float32 [] on the device.

        Where the gradient is not finite, weights, moments and EMAs keep their values. Nothing waits for the device,
        except torch's loss scaler with apex's optimizer, which does not skip steps by itself.
        """
        config, scaler = self.config, self.accelerator.scaler

        # Gradients of the global batch.
        self.window += self.accumulate(step)
        grad_norm = self._clip_gradients()

        # Did it overflow? As a tensor, 0 or 1, so that the device decides and nobody waits.
        if scaler is None:
            # torch's fused optimizers and ours skip the step where their attribute `found_inf` is 1; without a loss
            # scaler nobody else sets it. Into `__dict__`, because the type does not declare it (torch 2.13).
            found_inf = (~torch.isfinite(grad_norm)).float()
            self.optimizer.__dict__["found_inf"] = found_inf
        else:
            # Before the step: in it the scaler resets what it knows about this optimizer. With a fused optimizer
            # accelerate never reports a skipped step. `_found_inf_per_device` was read in torch 2.13.
            found_inf = sum(scaler._found_inf_per_device(self.optimizer).values())

        # Update. `found_inf` is a plain tensor beside sharded weights, hence the implicit replication.
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, config.train.max_train_steps)
        with implicit_replication():
            self.prepared_optimizer.step()
        self.prepared_optimizer.zero_grad()
        for ema in self.emas.values():
            ema.update(step, found_inf)

        # Remember the first overflow, for `check_health` to repeat that step.
        first = (self.first_skipped < 0) & (found_inf > 0)
        self.first_skipped = torch.where(first, step, self.first_skipped)
        return grad_norm

    def accumulate(self, step: int) -> torch.Tensor:
        """Compute the gradients of step `step`, forward and backward of each micro-batch.

        Returns:
            float32 [2, NOISE_LEVELS], on the device: sum of the losses and number of images of this rank by noise
            level.
        """
        config, parts = self.config, self.config.train.gradient_accumulation_steps

        # Every rank samples for the whole global batch and takes its slice: the number of ranks changes nothing.
        shape = (config.train.global_batch_size, *self.reader.latent_shape)
        randomness = sample_step_randomness(
            config.objective, config.train.seed, step, shape, len(self.reader.conditions), self.device
        )

        total = torch.zeros_like(self.window)
        for part in range(parts):
            # The next micro-batch, perhaps the next step's first, is read while this one is computed.
            following = (step, part + 1) if part + 1 < parts else (step + 1, 0)
            batch = self.batches.get((step, part), following)
            own = randomness[self._positions(part)]

            # Gradients are exchanged between ranks once a step, in the last micro-batch's backward.
            with self.accelerator.no_sync(self.model) if part + 1 < parts else contextlib.nullcontext():
                values = self.losses(*self._loss_inputs(batch, own))  # [micro_batch]
                self.accelerator.backward(values.mean() / parts)

            levels = noise_level(own.timesteps, config.objective.num_train_timesteps)  # [micro_batch, NOISE_LEVELS]
            total += torch.stack([values.detach() @ levels, levels.sum(0)])
        return total

    def losses(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, condition_ids: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted loss of each image, float32 [batch].

        Args:
            latents: The VAE's latents before normalization, float32 [batch, channels, height, width].
            noise: Unit normal, the same shape.
            timesteps: float32 [batch], whole numbers 0 … T - 1.
            condition_ids: int64 [batch, conditions].
        """
        objective = self.config.objective
        clean = (latents - self.mean) / self.std  # [batch, c, h, w]
        noisy = self.scheduler.add_noise(clean, noise, timesteps)  # [batch, c, h, w]
        # Timesteps as integers: FSDP2 casts floating-point inputs to half precision, which rounds above 256 (bf16).
        prediction = self.model(noisy, timesteps.long(), condition_ids, return_dict=False)[0]  # [batch, c, h, w]
        target = training_target(self.scheduler, clean, noise, timesteps)  # [batch, c, h, w]
        weights = loss_weights(self.scheduler, timesteps, objective.snr_gamma, objective.snr_weighting)  # [batch]
        return losses(prediction, target, weights, objective.loss, objective.huber_c)

    def begin_window(self) -> None:
        """Reset the sums after they have been logged."""
        # New tensors, not zeros in place: the old ones may still be in use.
        self.window = torch.zeros_like(self.window)
        self.first_skipped = torch.full_like(self.first_skipped, -1)

    def _clip_gradients(self) -> torch.Tensor:
        """Clip the gradients to `max_grad_norm`, if it is not 0; return their norm before that, float32 []."""
        limit, parameters = self.config.optim.max_grad_norm, list(self.model.parameters())
        if limit:
            norm = self.accelerator.clip_grad_norm_(parameters, limit)
        else:
            # `clip_grad_norm_` removes the loss scale; here it must be done by hand before the norm means anything.
            self.accelerator.unscale_gradients(self.prepared_optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _positions(self, part: int) -> slice:
        """Positions in the global batch of this rank's micro-batch number `part`."""
        first = self.accelerator.process_index * self.config.train.gradient_accumulation_steps + part
        return slice(first * self.micro_batch_size, (first + 1) * self.micro_batch_size)

    def _read(self, key: tuple[int, int]) -> dict[str, np.ndarray]:
        """Read this rank's micro-batch `key` (step, part)."""
        step, part = key
        seed, batch_size = self.config.train.seed, self.config.train.global_batch_size
        rows = self._positions(part)
        # Flips are sampled for the whole batch too, and sliced.
        flips = sample_flips(seed, step, batch_size)[rows] if self.config.data.flip else None
        return self.reader.batch(seed, step * batch_size + rows.start, self.micro_batch_size, flips)

    def _loss_inputs(
        self, batch: dict[str, torch.Tensor], randomness: StepRandomness
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return latents, noise, timesteps and condition ids of a micro-batch, the arguments of `losses`."""
        latents = batch["latent_mean"].float()  # [micro_batch, c, h, w]
        # A new sample of the VAE's posterior at every step, where the cache holds its standard deviation.
        if "latent_std" in batch:
            latents = latents + batch["latent_std"].float() * randomness.posterior_noise
        # Dropped conditions become the null condition.
        condition_ids = torch.where(randomness.keep, batch["condition_ids"], self.transformer.null_condition_ids)
        return latents, randomness.noise, randomness.timesteps, condition_ids
