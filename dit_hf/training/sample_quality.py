"""Sample quality during training: the Fréchet distance of a few thousand samples of the EMA weights."""

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
    """Fréchet distance between samples and the cache's first images, as the VAE decodes them.

    Noise and attributes are the same each time: seed 0, and the attributes of the cache's first images.

    Args:
        config: The recipe.
        reader: Of the training images.
        accelerator: Of the run; all its ranks generate.

    Attributes:
        name: The column in the log, with feature network and number of samples.

    Raises:
        ValueError: if the feature network cannot be loaded.
    """

    def __init__(self, config: Config, reader: LatentReader, accelerator: Accelerator):
        self.config, self.reader, self.accelerator = config, reader, accelerator
        self.count = config.train.evaluation_samples
        self.net: FeatureNet = load_features(config.train.evaluation_features, device=accelerator.device)
        self.name = figure_name(self.net.label, self.count)
        self._reference: Gaussian | None = None

    def measure(self, pipeline: LatentDiTPipeline) -> dict[str, float]:
        """Measure the distance of the images that `pipeline` generates; call it on all ranks.

        Returns:
            The distance, by the name of its column.
        """
        attributes, steps = self.reader.attributes(self.count), self.config.train.num_inference_steps

        # The reference: decoded latents and not the images themselves, which a run does not have. Computed once.
        if self._reference is None:
            vae, stored = pipeline.vae, self.reader.indices

            def decode_images(numbers: list[int]) -> np.ndarray:
                latents = self.reader.read("latent_mean", stored[np.array(numbers) % len(stored)])
                return decode(vae, torch.from_numpy(latents)).cpu().numpy()

            self._reference = Gaussian.of(self._features(decode_images, min(self.count, len(stored))))

        # The samples.
        def generate(numbers: list[int]) -> np.ndarray:
            return generate_images(pipeline, numbers, attributes, seed=0, num_inference_steps=steps)

        return {self.name: frechet_distance(self._features(generate, self.count), self._reference)}

    def _features(self, images: Callable[[list[int]], np.ndarray], count: int) -> np.ndarray:
        """Compute the features of images 0 … count - 1, [count, dim]; ranks share the batches.

        Args:
            images: Returns the images of these numbers, uint8 [len(numbers), height, width, 3].
            count: Number of images.
        """
        # All ranks compute equally many full batches, because a sharded model gathers its weights in each. Numbers
        # beyond the last image start again at 0, and their features are dropped at the end.
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        each = -(-count // (BATCH_SIZE * ranks))
        features = []
        for batch in range(rank, each * ranks, ranks):
            numbers = [number % count for number in range(batch * BATCH_SIZE, (batch + 1) * BATCH_SIZE)]
            features.append(torch.from_numpy(self.net(images(numbers))))
        own = torch.stack(features).to(self.accelerator.device)  # [each, BATCH_SIZE, dim]

        # Batch b was rank b % ranks' number b // ranks: swap these two axes to restore the order.
        gathered = self.accelerator.gather(own).view(ranks, each, BATCH_SIZE, -1)
        return gathered.transpose(0, 1).reshape(-1, gathered.shape[-1])[:count].cpu().numpy()
