"""A small CNN that classifies attributes of avatars, for benchmarks of whether images show the requested ones."""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dit_hf.data.avatars import ATTRIBUTES, choose_face, render_face

TRAINING_SEED, NUM_TRAINING, EPOCHS, BATCH = 77, 6000, 10, 64


def avatars(seed: int, count: int, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Return images, uint8 [count, size, size, 3], and attributes, int64 [count, 22], of avatars of `seed`."""
    faces = [choose_face(seed, index) for index in range(count)]
    images = np.stack([np.asarray(render_face(face, size)) for face in faces])
    return images, np.array([[face.attributes[name] for name in ATTRIBUTES] for face in faces])


def train_classifier() -> nn.Module:
    """Train half a million parameters for ten epochs on 6,000 avatars of a seed of their own."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = [3, 32, 64, 128, 192]
    for before, after in itertools.pairwise(channels):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
    layers += [nn.Flatten(), nn.Dropout(0.1), nn.Linear(192 * 16, len(ATTRIBUTES))]
    classifier = nn.Sequential(*layers)
    images, labels = avatars(TRAINING_SEED, NUM_TRAINING)
    # Train on the avatars, blurred at random.
    data, targets = torch.from_numpy(images), torch.from_numpy(labels).float()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.01)
    steps = EPOCHS * (NUM_TRAINING // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(NUM_TRAINING, (BATCH,))
        loss = F.binary_cross_entropy_with_logits(classifier(_prepare(data[rows], jitter=True)), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


@torch.no_grad()
def classify(classifier: nn.Module, images: np.ndarray) -> np.ndarray:
    """Return the attributes shown in images, uint8 [n, 64, 64, 3], as int64 [n, 22]."""
    return np.concatenate(
        [(classifier(_prepare(part)) > 0).long().numpy() for part in torch.from_numpy(images).split(256)]
    )


def accuracies(predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return the share of correct predictions by attribute."""
    return {name: round(float((predicted[:, i] == targets[:, i]).mean()), 4) for i, name in enumerate(ATTRIBUTES)}


def balanced_accuracy(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Return the accuracy, averaged first over yes and no, then over the attributes."""
    values = [
        np.mean(
            [(predicted[rows, i] == answer).mean() for answer in (0, 1) if (rows := targets[:, i] == answer).any()]
        )
        for i in range(targets.shape[1])
    ]
    return round(float(np.mean(values)), 4)


def _prepare(images: torch.Tensor, jitter: bool = False) -> torch.Tensor:
    """Convert to float32 [n, 3, 64, 64] in [-1, 1]; `jitter` blurs a little at random, as decoding by a VAE does."""
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    if jitter:
        blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        share = torch.rand(len(pixels), 1, 1, 1) * 0.7
        pixels = torch.lerp(pixels, blurred, share) + 0.03 * torch.randn_like(pixels)
    return pixels
