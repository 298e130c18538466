"""Validation: the loss on held-out images at fixed noise, by noise level."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator

from ..config import Config
from ..latents.reader import LatentReader
from .objective import NOISE_LEVELS, noise_level
from .step import TrainingStep

# Noisy latents' ingredients to losses: clean latents, noise, timesteps, condition ids -> [batch].
LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Validation:
    """Held-out images, each with ten timesteps (one in each tenth of the schedule) and noise that never change.

    Args:
        reader: Of the validation split.
        count: How many of its images, the first in the order of the cache.
        num_train_timesteps: Levels of the schedule.
        batch_size: Evaluations at once.
        device: Where they are done.
    """

    def __init__(
        self, reader: LatentReader, count: int, num_train_timesteps: int, batch_size: int, device: torch.device
    ):
        self.count, self.batch_size, self.device = min(count, len(reader)), batch_size, device
        rows = reader.indices[: self.count]
        self.latents = torch.from_numpy(reader.read("latent_mean", rows)).float()
        self.condition_ids = torch.from_numpy(reader.condition_ids(rows))
        self.num_train_timesteps = num_train_timesteps
        # Image i is at the (i + 1/2) / count of each tenth, so that all of the schedule is seen.
        inside = (torch.arange(self.count) + 0.5) / self.count
        timesteps = (torch.arange(NOISE_LEVELS)[:, None] + inside) * num_train_timesteps / NOISE_LEVELS
        self.timesteps = timesteps.floor().flatten()

    def validate_emas(self, step: TrainingStep, accelerator: Accelerator) -> dict[str, float]:
        """The averages' losses by the name of their column in the log; to be called on all ranks."""
        found = {}
        for name, average in step.averages.items():
            with average.swapped_in():
                sums = self.losses(step.losses, accelerator.process_index, accelerator.num_processes)
            total, count = accelerator.reduce(sums, "sum").cpu()
            suffix = name.removeprefix("ema")
            found[f"validation_loss{suffix}"] = (total.sum() / count.sum()).item()
            if not suffix:
                found |= {f"validation_loss_level_{i}": value for i, value in enumerate((total / count).tolist())}
        return found

    @torch.no_grad()
    def losses(self, loss: LossFunction, rank: int, num_ranks: int) -> torch.Tensor:
        """Sum of the losses and number of evaluations by noise level, float32 [2, 10], of this rank's share.

        Every rank calls `loss` as often as the others do, as sharded models need.
        """
        total = len(self.timesteps)
        each = -(-total // (num_ranks * self.batch_size)) * self.batch_size
        result = torch.zeros(2, NOISE_LEVELS, device=self.device)
        for start in range(rank * each, (rank + 1) * each, self.batch_size):
            places = torch.arange(start, start + self.batch_size)
            counted, places = (places < total).float().to(self.device), places.clamp(max=total - 1)
            pictures, timesteps = places % self.count, self.timesteps[places].to(self.device)
            noise = torch.stack([self._noise(int(picture)) for picture in pictures]).to(self.device)
            latents, ids = self.latents[pictures].to(self.device), self.condition_ids[pictures].to(self.device)
            levels = noise_level(timesteps, self.num_train_timesteps) * counted[:, None]
            values = loss(latents, noise, timesteps, ids)
            result += torch.stack([values @ levels, levels.sum(0)])
        return result

    def _noise(self, picture: int) -> torch.Tensor:
        """Drawn on the CPU, so that it is the same whatever the device."""
        return torch.randn(self.latents.shape[1:], generator=torch.Generator().manual_seed(picture))


def choose_validation(
    config: Config, conditions: list[str], step: TrainingStep, say: Callable[[str], None]
) -> Validation | None:
    """The validation that a recipe asks for; None, told through `say`, where the cache has no images for it."""
    count, timesteps = config.train.validation_images, config.objective.num_train_timesteps
    if not count:
        return None
    try:
        reader = LatentReader(config.data.latents, "validation", conditions)
    except ValueError as error:
        say(f"{error}: no validation loss, and no best checkpoint")
        return None
    return Validation(reader, count, timesteps, step.micro_batch_size, step.device)
