"""Attribute probe: a small head on the features that recognizes whether images show the requested attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

EPOCHS, BATCH, WIDTH, HELD_OUT = 40, 128, 256, 0.2


@dataclass(frozen=True)
class AttributeHead:
    """A head that recognizes conditions in features, trained on real images.

    Attributes:
        sizes: Number of values of each condition.
        network: Maps features, float32 [batch, dim], to the logits of all conditions, [batch, sum of sizes].
        held_out: Accuracy of each condition on held-out real images.
    """

    sizes: dict[str, int]
    network: nn.Module
    held_out: dict[str, float]

    @torch.no_grad()
    def predict(self, features: np.ndarray) -> dict[str, np.ndarray]:
        """Return the most likely value of each condition, [batch], for features [batch, dim]."""
        logits = self.network(torch.from_numpy(features)).split(list(self.sizes.values()), 1)
        return {name: part.argmax(1).numpy() for name, part in zip(self.sizes, logits, strict=True)}

    def accuracy(self, features: np.ndarray, requested: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return how often images show their requested attributes, beside the head's own accuracy on real images.

        `balanced_accuracy` is the mean over the values of a condition, so that always predicting the most frequent
        value gains nothing.

        Args:
            features: float32 [batch, dim].
            requested: The requested ids of each image; a name that is missing was not requested.
        """
        predicted = self.predict(features)
        targets = {name: np.array([row.get(name, -1) for row in requested]) for name in self.sizes}
        names = [name for name in self.sizes if (targets[name] >= 0).any()]
        by_name = {name: _accuracy(predicted[name], targets[name]) for name in names}
        balanced = [_balanced_accuracy(predicted[name], targets[name]) for name in names]
        return {
            "accuracy": float(np.mean(list(by_name.values()))),
            "balanced_accuracy": float(np.mean(balanced)),
            "accuracy_on_real": float(np.mean([self.held_out[name] for name in names])),
            "by_attribute": {name: {"drawn": by_name[name], "real": self.held_out[name]} for name in names},
        }


def train_head(features: np.ndarray, conditions: Mapping[str, np.ndarray], seed: int = 0) -> AttributeHead:
    """Train a head with one hidden layer on features of real images and their own attributes.

    Args:
        features: float32 [count, dim].
        conditions: Ids by name, [count]; -1 is missing.
        seed: Seed of the weights, the order of the images, and the fifth of them that is held out.
    """
    sizes = {name: max(1, int(ids.max()) + 1) for name, ids in conditions.items()}
    targets = torch.from_numpy(np.stack(list(conditions.values()), 1).astype(np.int64))  # [count, conditions]
    inputs = torch.from_numpy(features)
    rng = np.random.default_rng(seed)
    held_out, training = np.split(rng.permutation(len(features)), [max(1, int(HELD_OUT * len(features)))])

    # Initialize from the seed without touching the caller's random state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden, out = nn.Linear(inputs.shape[1], WIDTH), nn.Linear(WIDTH, sum(sizes.values()))
    network = nn.Sequential(_Standardize(inputs[training]), hidden, nn.GELU(), out)

    # Train with one cross-entropy for each condition.
    batches_per_epoch = -(-len(training) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=EPOCHS * batches_per_epoch)
    for _ in range(EPOCHS):
        for rows in np.array_split(rng.permutation(training), batches_per_epoch):
            logits = network(inputs[rows]).split(list(sizes.values()), 1)
            # Without the conditions that no image of the batch has a value of: a mean of nothing is not a number.
            pairs = [(part, targets[rows, i]) for i, part in enumerate(logits) if (targets[rows, i] >= 0).any()]
            losses = [F.cross_entropy(part, ids, ignore_index=-1) for part, ids in pairs]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            schedule.step()

    # Measure it on the held-out images, the yardstick for the accuracy on samples.
    predicted = AttributeHead(sizes, network.eval(), {}).predict(features[held_out])
    accuracies = {name: _accuracy(predicted[name], ids[held_out]) for name, ids in conditions.items()}
    return AttributeHead(sizes, network, accuracies)


class _Standardize(nn.Module):
    """Shift and scale that give the training features mean 0 and standard deviation 1."""

    def __init__(self, features: torch.Tensor):
        super().__init__()
        self.mean, self.std = features.mean(0), features.std(0).clamp(min=1e-6)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean) / self.std


def _accuracy(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Return the share of equal values among the images that have one; 0 if none has."""
    known = targets >= 0
    return float(np.mean(predicted[known] == targets[known])) if known.any() else 0.0


def _balanced_accuracy(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Return the accuracy averaged over the values that occur in `targets`; -1 is missing."""
    values = np.unique(targets[targets >= 0])
    return float(np.mean([np.mean(predicted[targets == value] == value) for value in values]))
