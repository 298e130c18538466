"""What one optimizer step does: read, sample_step_randomness, forward, backward, clip, update, average."""

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
from ..runs import Normalization
from ..schedulers.scheduling_cosine_latent import CosineLatentScheduler
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
    """A model in training, and the step that makes it better; the same numbers for any number of ranks.

    Args:
        config: The recipe.
        reader: Of the training images.
        accelerator: Prepares model and optimizer for its devices.
        transformer: The model, on the device; sharded in place under FSDP2.
        normalization: Mean and standard deviation by channel of the latents.

    Raises:
        ValueError: if ranks and accumulation do not divide the batch.
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
        train, ranks, self.device = config.train, accelerator.num_processes, accelerator.device
        if train.global_batch_size % (ranks * train.gradient_accumulation_steps):
            raise ValueError(
                f"train.global_batch_size={train.global_batch_size} is not divisible by {ranks} ranks x "
                f"{train.gradient_accumulation_steps} accumulations"
            )
        self.micro_batch_size = train.global_batch_size // (ranks * train.gradient_accumulation_steps)
        self.scheduler = CosineLatentScheduler(
            num_train_timesteps=config.objective.num_train_timesteps, prediction_type=config.objective.prediction_type
        )
        self.optimizer, self.optimizer_name = build_optimizer(
            transformer, config.optim, self.device, accelerator.mixed_precision, accelerator.is_fsdp2
        )
        self.model, self.prepared_optimizer = accelerator.prepare(transformer, self.optimizer)
        decays = {f"ema-{decay:g}": decay for decay in config.optim.extra_ema_decays}
        decays = {"ema": config.optim.ema_decay, **decays}
        self.averages = {name: EMA(self.model, decay) for name, decay in decays.items()}
        self.batches = BatchPrefetcher(self._read, self.device)
        self.mean, self.std = (torch.tensor(v, device=self.device).view(1, -1, 1, 1) for v in normalization)
        # Of this rank since the last row of the log: sum of the losses and number of images by noise level,
        # and the first step whose gradient was not finite, or -1.
        self.window = torch.zeros(2, NOISE_LEVELS, device=self.device)
        self.first_skipped = torch.full((), -1, device=self.device)

    def __call__(self, step: int) -> torch.Tensor:
        """Optimizer step `step` (from 0); returns the gradient's norm, on the device.

        Where the gradient is not finite, weights, moments and averages stand still. Nothing waits for the device, but
        for torch's scaler before a step of apex's optimizer, which does not skip steps by itself.
        """
        config, scaler = self.config, self.accelerator.scaler
        self.window += self.accumulate(step)
        grad_norm = self._clip_gradients()
        if scaler is None:
            found_inf = (~torch.isfinite(grad_norm)).float()
            self.optimizer.__dict__["found_inf"] = found_inf  # as a scaler would tell torch's fused optimizers
        else:  # read before the step: afterwards the scaler has forgotten whether this step overflowed
            found_inf = sum(scaler._found_inf_per_device(self.optimizer).values())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, config.train.max_train_steps)
        with implicit_replication():  # of found_inf, beside sharded weights
            self.prepared_optimizer.step()
        self.prepared_optimizer.zero_grad()
        for average in self.averages.values():
            average.update(step, found_inf)
        first = (self.first_skipped < 0) & (found_inf > 0)
        self.first_skipped = torch.where(first, step, self.first_skipped)
        return grad_norm

    def accumulate(self, step: int) -> torch.Tensor:
        """Forward and backward of a step; sum of the losses and number of images of this rank by noise level."""
        config, parts = self.config, self.config.train.gradient_accumulation_steps
        shape = (config.train.global_batch_size, *self.reader.latent_shape)
        draws = sample_step_randomness(
            config.objective, config.train.seed, step, shape, len(self.reader.conditions), self.device
        )
        total = torch.zeros_like(self.window)
        for part in range(parts):
            following = (step, part + 1) if part + 1 < parts else (step + 1, 0)
            batch, own = self.batches.get((step, part), following), draws[self._positions(part)]
            with self.accelerator.no_sync(self.model) if part + 1 < parts else contextlib.nullcontext():
                values = self.losses(*self._loss_inputs(batch, own))
                self.accelerator.backward(values.mean() / parts)
            levels = noise_level(own.timesteps, config.objective.num_train_timesteps)
            total += torch.stack([values.detach() @ levels, levels.sum(0)])
        return total

    def losses(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, condition_ids: torch.Tensor
    ) -> torch.Tensor:
        """The weighted loss of each image, float32 [batch], from the VAE's own latents [batch, c, h, w]."""
        objective, clean = self.config.objective, (latents - self.mean) / self.std
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        # Whole numbers stay what they are where FSDP makes the model's inputs half precision.
        prediction = self.model(noisy, timesteps.long(), condition_ids, return_dict=False)[0]
        target = training_target(self.scheduler, clean, noise, timesteps)
        weights = loss_weights(self.scheduler, timesteps, objective.snr_gamma, objective.snr_weighting)
        return losses(prediction, target, weights, objective.loss, objective.huber_c)

    def _clip_gradients(self) -> torch.Tensor:
        """The gradient's norm before clipping, without the loss scale; without a limit the gradient is only read."""
        limit, parameters = self.config.optim.max_grad_norm, list(self.model.parameters())
        if limit:
            norm = self.accelerator.clip_grad_norm_(parameters, limit)
        else:
            self.accelerator.unscale_gradients(self.prepared_optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def begin_window(self) -> None:
        """Forget the sums that have been logged."""
        self.window, self.first_skipped = torch.zeros_like(self.window), torch.full_like(self.first_skipped, -1)

    def _positions(self, part: int) -> slice:
        """Where in the global batch this rank's micro-batch number `part` is."""
        first = self.accelerator.process_index * self.config.train.gradient_accumulation_steps + part
        return slice(first * self.micro_batch_size, (first + 1) * self.micro_batch_size)

    def _read(self, key: tuple[int, int]) -> dict[str, np.ndarray]:
        """The micro-batch `key` (step, part) of this rank."""
        (step, part), seed, batch_size = key, self.config.train.seed, self.config.train.global_batch_size
        rows = self._positions(part)
        flips = sample_flips(seed, step, batch_size)[rows] if self.config.data.flip else None
        return self.reader.batch(seed, step * batch_size + rows.start, self.micro_batch_size, flips)

    def _loss_inputs(self, batch: dict[str, torch.Tensor], draws: StepRandomness) -> tuple[torch.Tensor, ...]:
        """Latents, noise, timesteps and condition ids of a micro-batch."""
        latents = batch["latent_mean"].float()
        if "latent_std" in batch:
            latents = latents + batch["latent_std"].float() * draws.posterior_noise
        condition_ids = torch.where(draws.keep, batch["condition_ids"], self.transformer.null_condition_ids)
        return latents, draws.noise, draws.timesteps, condition_ids
