"""Models of other systems with the training step of their own scripts, for `train_step.py`.

facebookresearch/DiT and fast-DiT are imported from public checkouts; none of their code is here. They need three
layers of timm, which cannot be imported with a CPU build of torch (it needs torchvision): then layers with the same
arithmetic replace them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from torch import nn

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class PlainStep:
    """A training step: noise, forward, L1, backward, torch's AdamW, EMA; with autocast, and a loss scale for fp16.

    Args:
        model: The model on its device.
        forward: Maps noisy latents, timesteps and labels to the prediction.
        update_ema: Updates the EMA after a step.
        sizes: Shape of the latents, [batch, channels, height, width].
        precision: `no`, `fp16` or `bf16`.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        update_ema: Callable[[], None],
        sizes: tuple[int, ...],
        precision: str,
    ):
        self.model, self.forward, self.update_ema, self.sizes = model, forward, update_ema, sizes
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
        self.dtype = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.clean = torch.randn(sizes, device=self.device)
        self.alphas = torch.linspace(0.999, 0.01, 1000, device=self.device)

    def __call__(self, step: int) -> None:
        batch = self.sizes[0]
        timesteps = torch.randint(1000, (batch,), device=self.device)
        labels = torch.zeros(batch, dtype=torch.long, device=self.device)
        noise = torch.randn_like(self.clean)
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha * self.clean + (1 - alpha.square()).sqrt() * noise
        half = self.dtype is not None
        with torch.autocast(self.device.type, self.dtype) if half else contextlib.nullcontext():
            loss = F.l1_loss(self.forward(noisy, timesteps, labels).float(), self.clean)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.update_ema()


def facebookresearch_dit(checkout: Path, preset: dict[str, int], sizes: tuple[int, ...], **place: Any) -> PlainStep:
    """Build the step of a checkout's `models.py`, with the EMA updated weight by weight as in its `train.py`."""
    provide_timm_layers()
    spec = importlib.util.spec_from_file_location(
        f"models_of_{checkout.name.replace('-', '_')}", checkout / "models.py"
    )
    if spec is None or spec.loader is None:
        raise ValueError(f"{checkout} has no models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.DiT(
        input_size=sizes[-1],
        patch_size=preset["patch_size"],
        in_channels=sizes[1],
        hidden_size=preset["num_attention_heads"] * preset["attention_head_dim"],
        depth=preset["num_layers"],
        num_heads=preset["num_attention_heads"],
        num_classes=1,
        learn_sigma=False,
    ).to(place["device"])
    ema = deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update_ema() -> None:
        for mean, weight in zip(ema.parameters(), model.parameters(), strict=True):
            mean.mul_(0.9999).add_(weight, alpha=1 - 0.9999)

    return PlainStep(model, model, update_ema, sizes, place["precision"])


def diffusers_dit(preset: dict[str, int], sizes: tuple[int, ...], **place: Any) -> PlainStep:
    """Build the step of diffusers' DiT, with diffusers' EMA."""
    model = DiTTransformer2DModel(
        sample_size=sizes[-1], in_channels=sizes[1], out_channels=sizes[1], num_embeds_ada_norm=1000, **preset
    ).to(place["device"])
    ema = EMAModel(model.parameters(), decay=0.9999)

    def forward(noisy: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return model(noisy, timesteps, labels, return_dict=False)[0]

    return PlainStep(model, forward, lambda: ema.step(model.parameters()), sizes, place["precision"])


def provide_timm_layers() -> None:
    """Provide the layers that DiT imports from timm, if timm cannot be imported."""
    with contextlib.suppress(ImportError, AttributeError):
        importlib.import_module("timm.models.vision_transformer")
        return
    layers: Any = ModuleType("timm.models.vision_transformer")
    layers.PatchEmbed, layers.Attention, layers.Mlp = PatchEmbed, Attention, Mlp
    sys.modules |= {"timm": ModuleType("timm"), "timm.models": ModuleType("timm.models"), layers.__name__: layers}


class PatchEmbed(nn.Module):
    """Patches by a convolution, flattened to tokens."""

    def __init__(self, size: int, patch: int, channels: int, dim: int, bias: bool = True):
        super().__init__()
        self.patch_size = (patch, patch)
        self.num_patches = (size // patch) ** 2
        self.proj = nn.Conv2d(channels, dim, patch, patch, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values, by torch's fused kernel."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False, **_: Any):
        super().__init__()
        self.heads, self.qkv, self.proj = num_heads, nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with an activation between."""

    def __init__(self, in_features: int, hidden_features: int, act_layer: Callable[[], nn.Module], drop: float = 0.0):
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))
