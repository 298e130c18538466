"""Validation: the loss on held-out images at fixed noise, by noise level."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator

from ..config import Config
from ..latents.reader import LatentReader
from .objective import NOISE_LEVELS, noise_level
from .step import TrainingStep

# (latents, noise, timesteps, condition ids) -> losses [batch]; see `TrainingStep.losses`.
LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Validation:
    """Held-out images, each with fixed noise and ten fixed timesteps, one in each tenth of the schedule.

    Nothing about it changes during a run, so that losses of different steps compare the weights alone.

    Args:
        reader: Of the validation split.
        count: Number of images, the first in the order of the cache; all, if there are fewer.
        num_train_timesteps: Levels of the schedule.
        batch_size: Evaluations (an image at a timestep) at once.
        device: Where they are done.
    """

    def __init__(
        self, reader: LatentReader, count: int, num_train_timesteps: int, batch_size: int, device: torch.device
    ):
        self.count, self.batch_size, self.device = min(count, len(reader)), batch_size, device
        self.num_train_timesteps = num_train_timesteps

        # Kept on the CPU: the posterior's mean, float32 [count, c, h, w], and ids, int64 [count, conditions].
        rows = reader.indices[: self.count]
        self.latents = torch.from_numpy(reader.read("latent_mean", rows)).float()
        self.condition_ids = torch.from_numpy(reader.condition_ids(rows))

        # Image i is at fraction (i + 1/2) / count of each tenth, so that together they cover the whole schedule.
        # Evaluation e is of image e % count, in tenth e // count.
        fractions = (torch.arange(self.count) + 0.5) / self.count  # [count]
        timesteps = (torch.arange(NOISE_LEVELS)[:, None] + fractions) * num_train_timesteps / NOISE_LEVELS
        self.timesteps = timesteps.floor().flatten()  # [NOISE_LEVELS * count]

    def validate_emas(self, step: TrainingStep, accelerator: Accelerator) -> dict[str, float | None]:
        """Return the losses of all EMAs by the name of their column in the log; call it on all ranks."""
        columns: dict[str, float | None] = {}
        for name, ema in step.emas.items():
            with ema.swapped_in():
                sums = self.losses(step.losses, accelerator.process_index, accelerator.num_processes)
            total, count = accelerator.reduce(sums, "sum").cpu()  # each [NOISE_LEVELS]

            # Further EMAs have their decay in the name; losses by noise level are of the main one only.
            suffix = name.removeprefix("ema")
            columns[f"validation_loss{suffix}"] = (total.sum() / count.sum()).item()
            if not suffix:
                # Few timesteps leave some tenths of them without any.
                by_level = [value / n if n else None for value, n in zip(total.tolist(), count.tolist(), strict=True)]
                columns |= {f"validation_loss_level_{i}": value for i, value in enumerate(by_level)}
        return columns

    @torch.no_grad()
    def losses(self, loss: LossFunction, rank: int, num_ranks: int) -> torch.Tensor:
        """Compute this rank's part of the validation.

        Args:
            loss: The model's.
            rank: Of this process.
            num_ranks: How many share the evaluations.

        Returns:
            float32 [2, NOISE_LEVELS] on the device: sum of the losses and number of evaluations by noise level.
        """
        # All ranks call `loss` equally often and with full batches, because sharded models gather their weights in it
        # and compiled ones are compiled for one shape. What is beyond the last evaluation repeats it and counts as 0.
        total = len(self.timesteps)
        each = -(-total // (num_ranks * self.batch_size)) * self.batch_size
        result = torch.zeros(2, NOISE_LEVELS, device=self.device)
        for start in range(rank * each, (rank + 1) * each, self.batch_size):
            evaluations = torch.arange(start, start + self.batch_size)  # [batch]
            counted = (evaluations < total).float().to(self.device)
            evaluations = evaluations.clamp(max=total - 1)

            # Image, noise and timestep of each.
            images = evaluations % self.count
            timesteps = self.timesteps[evaluations].to(self.device)
            noise = torch.stack([self._noise(int(image)) for image in images]).to(self.device)  # [batch, c, h, w]
            latents, ids = self.latents[images].to(self.device), self.condition_ids[images].to(self.device)

            # Sums by noise level, as products with a one-hot matrix.
            levels = noise_level(timesteps, self.num_train_timesteps) * counted[:, None]  # [batch, NOISE_LEVELS]
            values = loss(latents, noise, timesteps, ids)  # [batch]
            result += torch.stack([values @ levels, levels.sum(0)])
        return result

    def _noise(self, image: int) -> torch.Tensor:
        """Sample the noise of an image, float32 [c, h, w], on the CPU: the same for every device."""
        return torch.randn(self.latents.shape[1:], generator=torch.Generator().manual_seed(image))


def choose_validation(
    config: Config, training: LatentReader, step: TrainingStep, log: Callable[[str], None]
) -> Validation | None:
    """Build the validation of a recipe; None where it has none, or where the cache has no images for it.

    Args:
        config: The recipe.
        training: Reader of the training split, with the conditions of the model.
        step: Whose device and micro-batch size it uses.
        log: Receives a line if the cache has no validation split.
    """
    count, timesteps = config.train.validation_images, config.objective.num_train_timesteps
    if not count:
        return None
    try:
        reader = training.of_split("validation")
    except ValueError as error:
        log(f"{error}: no validation loss, and no best checkpoint")
        return None
    return Validation(reader, count, timesteps, step.micro_batch_size, step.device)
