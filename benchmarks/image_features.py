"""Features of images in memory, for the benchmarks that compare images with avatars."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image

from dit_hf.evaluation.features import FeatureNet

BATCH = 50


def features_of(net: FeatureNet, images: Iterable[Image.Image | np.ndarray]) -> np.ndarray:
    """Return the features, float32 [n, dim], of RGB images of one size."""
    pixels = np.stack([np.asarray(image) for image in images])  # uint8 [n, height, width, 3]
    return np.concatenate([net(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)])
