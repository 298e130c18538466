"""Quality during training: the Fréchet distance of a few thousand samples of the averaged weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator

from ..config import Config
from ..evaluation.features import FeatureNet, load_features
from ..evaluation.metrics import Gaussian, frechet_distance
from ..evaluation.report import figure_name
from ..latents.reader import LatentReader
from ..latents.vae import decode
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..sampling.generate import generate_images

BATCH_SIZE = 32


class SampleQuality:
    """A Fréchet distance by the name it has in the log, always of the same noise and the cache's first attributes.

    The reference is what the cache's first images decode to. All ranks generate, as often as each other (as sharded
    models need), so that none waits for another until it gives up.

    Args:
        config: The recipe.
        reader: Of the training images.
        accelerator: Knows the ranks.

    Raises:
        ValueError: if the feature network cannot be had.
    """

    def __init__(self, config: Config, reader: LatentReader, accelerator: Accelerator):
        self.config, self.reader, self.accelerator = config, reader, accelerator
        self.count = config.train.evaluation_samples
        self.net: FeatureNet = load_features(config.train.evaluation_features, device=accelerator.device)
        self.name = figure_name(self.net.label, self.count)
        self._reference: Gaussian | None = None

    def measure(self, pipeline: LatentDiTPipeline) -> dict[str, float]:
        """The distance of what `pipeline` draws, by its name; to be called on all ranks."""
        rows, steps = self.reader.attributes(self.count), self.config.train.num_inference_steps
        if self._reference is None:
            vae, stored = pipeline.vae, self.reader.indices

            def decoded(numbers: list[int]) -> np.ndarray:
                latents = self.reader.read("latent_mean", stored[np.array(numbers) % len(stored)])
                return decode(vae, torch.from_numpy(latents)).cpu().numpy()

            self._reference = Gaussian.of(self._features(decoded, min(self.count, len(stored))))
        drawn = self._features(
            lambda numbers: generate_images(pipeline, numbers, rows, 0, num_inference_steps=steps), self.count
        )
        return {self.name: frechet_distance(drawn, self._reference)}

    def _features(self, pictures: Callable[[list[int]], np.ndarray], count: int) -> np.ndarray:
        """Features of images 0 … count - 1, [count, dim], of which each rank does its batches."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        each = -(-count // (BATCH_SIZE * ranks))
        parts = []
        for batch in range(rank, each * ranks, ranks):
            numbers = [number % count for number in range(batch * BATCH_SIZE, (batch + 1) * BATCH_SIZE)]
            parts.append(torch.from_numpy(self.net(pictures(numbers))))
        own = torch.stack(parts).to(self.accelerator.device)
        gathered = self.accelerator.gather(own).view(ranks, each, BATCH_SIZE, -1)
        return gathered.transpose(0, 1).reshape(-1, gathered.shape[-1])[:count].cpu().numpy()
