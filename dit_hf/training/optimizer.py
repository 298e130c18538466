"""The optimizer, and its learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..config import OptimConfig
from ..models.transformer_latent_dit import LatentDiTAttention
from .muon import Blocks, MuonAdamW


def build_optimizer(
    model: nn.Module, config: OptimConfig, device: torch.device, mixed_precision: str = "no", sharded: bool = False
) -> tuple[torch.optim.Optimizer, str]:
    """Build the optimizer and return it with its name.

    `adamw` is torch's fused AdamW. `apex_fused_adam` is NVIDIA apex's, which takes the same steps; torch's replaces it
    off CUDA, without fp16, where apex is not installed, and under FSDP2. `muon` is Muon for the matrices of attention
    (head by head) and feed-forward layers, and torch's fused AdamW for the rest.

    Args:
        model: Whose parameters are trained.
        config: The recipe's section.
        device: Of the parameters.
        mixed_precision: accelerate's: `no`, `fp16` or `bf16`.
        sharded: Whether FSDP2 will shard the parameters.
    """
    # Weight decay is for matrices only: biases, gains and embeddings have none.
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed = [p for p in model.parameters() if p.ndim > 1 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.ndim <= 1 or id(p) in embeddings]
    groups = [
        {"params": decayed, "weight_decay": config.adam_weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }

    # Muon: orthogonalized in the precision whose matrix products are fast, which on a CPU is what the run computes in.
    if config.optimizer == "muon":
        on_cpu = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
        options["dtype"] = torch.float16 if device.type == "cuda" else on_cpu
        return MuonAdamW(_muon_groups(model, groups), **options), "Muon and torch AdamW (fused)"

    # Adam. Without fp16 there is no loss scaler, which skips steps with a gradient that is not finite; apex by itself
    # takes them. Under FSDP2 apex does not find the memory behind a DTensor.
    usable = device.type == "cuda" and mixed_precision == "fp16" and not sharded
    if config.optimizer == "apex_fused_adam" and usable and (apex_adam := _apex_adam()):
        return apex_adam(groups, adam_w_mode=True, **options), "apex FusedAdam"
    return torch.optim.AdamW(groups, fused=True, **options), "torch AdamW (fused)"


def _apex_adam() -> Any:
    """Return apex's FusedAdam with a state like that of torch's AdamW, or None where apex is not installed."""
    try:
        from apex.optimizers import FusedAdam
    except ImportError:  # apex is optional, and the PyPI package of that name is another one
        return None

    class ResumableFusedAdam(FusedAdam):
        """apex's FusedAdam, saved as torch's AdamW, so that either resumes the other's runs.

        apex keeps one step count a group (`group["step"]`), torch one a parameter (`state[p]["step"]`).
        """

        def zero_grad(self, set_to_none: bool = True) -> None:
            # Callers pass torch's argument, which apex's method does not take: it always sets gradients to None.
            super().zero_grad()

        def state_dict(self) -> dict[str, Any]:
            # From the group to each of its parameters. In new dicts: those in torch's state dict are the optimizer's
            # own, which hold no count.
            state = super().state_dict()
            for group in state["param_groups"]:
                step = float(group.pop("step", 0))
                for index in group["params"]:
                    if index in state["state"]:
                        state["state"][index] = {**state["state"][index], "step": torch.tensor(step)}
            return state

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            # And back: all parameters of a group have taken the same number of steps.
            super().load_state_dict(state_dict)
            for group in self.param_groups:
                steps = [self.state[p].pop("step") for p in group["params"] if "step" in self.state[p]]
                if steps:
                    group["step"] = int(steps[0])

    return ResumableFusedAdam


def _muon_groups(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split the first of `groups`, the decayed ones: matrices of attention and feed-forward layers are Muon's."""
    # Not the layers that read and write latents, nor those of the conditions: Muon is for hidden layers.
    layers = (".attn.", ".ff.")
    inner = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and any(layer in name for layer in layers)}
    matrices = [p for p in groups[0]["params"] if id(p) in inner]
    rest = [p for p in groups[0]["params"] if id(p) not in inner]

    # Head by head: queries, keys and values are rows of a head, the output projection's columns are.
    heads: dict[int, Blocks] = {}
    for module in model.modules():
        if isinstance(module, LatentDiTAttention):
            heads |= {id(layer.weight): (module.heads, 1) for layer in (module.to_q, module.to_k, module.to_v)}
            heads[id(module.to_out[0].weight)] = (1, module.heads)
    blocks = [heads.get(id(p), (1, 1)) for p in matrices]
    return [
        {**groups[0], "params": matrices, "muon": True, "blocks": blocks},
        {**groups[0], "params": rest},
        groups[1],
    ]


def learning_rate(config: OptimConfig, step: int, max_train_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0): a pure function, so that resuming needs no state."""
    # Linear warm-up to the full rate.
    rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.lr_warmup_steps))

    # Decay by what is left of the run: 1 at its start, near 0 at its last step.
    left = 1 - step / max_train_steps
    if config.lr_scheduler == "cosine":
        return rate * 0.5 * (1 - math.cos(math.pi * left))
    if config.lr_scheduler == "linear":
        return rate * min(1.0, left / max(config.lr_decay_ratio, 1e-9))
    return rate
