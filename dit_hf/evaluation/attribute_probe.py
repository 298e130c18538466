"""Obedience: are the attributes that were asked for in the image? A small head on the features says."""

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
    """Reads conditions from features, as it learned from real images.

    Attributes:
        sizes: Number of values by condition.
        network: Features, float32 [batch, dim], to logits of all conditions side by side.
        held_out: Its accuracy by condition on real images it has not seen.
    """

    sizes: dict[str, int]
    network: nn.Module
    held_out: dict[str, float]

    @torch.no_grad()
    def read(self, features: np.ndarray) -> dict[str, np.ndarray]:
        """The most likely value of each condition, [batch]."""
        logits = self.network(torch.from_numpy(features)).split(list(self.sizes.values()), 1)
        return {name: part.argmax(1).numpy() for name, part in zip(self.sizes, logits, strict=True)}

    def accuracy(self, features: np.ndarray, asked: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """How often the images show what they were asked for, beside the head's own accuracy on real ones.

        `balanced` is the mean over the values of a condition, so that saying what is most frequent earns nothing.
        """
        names = [name for name in self.sizes if name in asked[0]]
        found, wanted = self.read(features), {name: np.array([row[name] for row in asked]) for name in names}
        by_name = {name: float(np.mean(found[name] == wanted[name])) for name in names}
        return {
            "accuracy": float(np.mean(list(by_name.values()))),
            "balanced_accuracy": float(np.mean([_balanced(found[name], wanted[name]) for name in names])),
            "accuracy_on_real": float(np.mean([self.held_out[name] for name in names])),
            "by_attribute": {name: {"drawn": by_name[name], "real": self.held_out[name]} for name in names},
        }


def train_head(features: np.ndarray, conditions: Mapping[str, np.ndarray], seed: int = 0) -> AttributeHead:
    """Train a head of one hidden layer on the features of real images with their own attributes.

    Args:
        features: float32 [count, dim].
        conditions: Ids by name, [count].
        seed: Of weights, order, and which fifth of the images is held out.
    """
    sizes = {name: int(ids.max()) + 1 for name, ids in conditions.items()}
    targets = torch.from_numpy(np.stack(list(conditions.values()), 1).astype(np.int64))
    inputs = torch.from_numpy(features)
    rng = np.random.default_rng(seed)
    unseen, seen = np.split(rng.permutation(len(features)), [max(1, int(HELD_OUT * len(features)))])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden, out = nn.Linear(inputs.shape[1], WIDTH), nn.Linear(WIDTH, sum(sizes.values()))
    network = nn.Sequential(_Standard(inputs[seen]), hidden, nn.GELU(), out)
    steps = EPOCHS * -(-len(seen) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in np.array_split(rng.permutation(seen), -(-len(seen) // BATCH)):
            logits = network(inputs[rows]).split(list(sizes.values()), 1)
            losses = [F.cross_entropy(part, targets[rows, i]) for i, part in enumerate(logits)]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            schedule.step()
    head = AttributeHead(sizes, network.eval(), {})
    read = head.read(features[unseen])
    held_out = {name: float(np.mean(read[name] == ids[unseen])) for name, ids in conditions.items()}
    return AttributeHead(sizes, network, held_out)


class _Standard(nn.Module):
    """Features with mean 0 and standard deviation 1."""

    def __init__(self, features: torch.Tensor):
        super().__init__()
        self.mean, self.std = features.mean(0), features.std(0).clamp(min=1e-6)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean) / self.std


def _balanced(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.mean([np.mean(found[wanted == value] == value) for value in np.unique(wanted)]))
