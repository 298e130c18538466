"""The optimizer, and its learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..config import OptimConfig
from .muon import MuonAdamW


def build_optimizer(
    model: nn.Module, config: OptimConfig, device: torch.device, mixed_precision: str = "no", sharded: bool = False
) -> tuple[torch.optim.Optimizer, str]:
    """Build the optimizer; returns it and its name. Only matrices are decayed, embeddings are not.

    `adamw` is torch's fused AdamW. `apex_fused_adam` is NVIDIA apex's, which takes the same steps; torch's is used
    where apex cannot be: off CUDA, without fp16 (where no loss scaler skips the steps whose gradient is not finite,
    which apex by itself takes), and for weights that FSDP2 will shard, whose memory apex does not find. `muon` is Muon
    for the matrices of attention and feed-forward layers, and torch's fused AdamW for the rest.
    """
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
    if config.optimizer == "muon":
        on_cpu = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
        options["dtype"] = torch.float16 if device.type == "cuda" else on_cpu
        return MuonAdamW(_muon_groups(model, groups), **options), "Muon and torch AdamW (fused)"
    usable = device.type == "cuda" and mixed_precision == "fp16" and not sharded
    if config.optimizer == "apex_fused_adam" and usable and (apex_adam := _apex_adam()):
        return apex_adam(groups, adam_w_mode=True, **options), "apex FusedAdam"
    return torch.optim.AdamW(groups, fused=True, **options), "torch AdamW (fused)"


def _apex_adam() -> Any:
    """apex's FusedAdam with a state like that of torch's AdamW, or None where apex is not installed."""
    try:
        from apex.optimizers import FusedAdam
    except ImportError:  # apex is optional, and the PyPI package of that name is another one
        return None

    class ResumableFusedAdam(FusedAdam):
        """apex counts steps by group, torch by parameter; saved as torch's, either resumes the other's runs."""

        def zero_grad(self, set_to_none: bool = True) -> None:  # with torch's argument
            super().zero_grad()

        def state_dict(self) -> dict[str, Any]:
            state = super().state_dict()
            for group in state["param_groups"]:
                step = float(group.pop("step", 0))
                for index in group["params"]:
                    if index in state["state"]:
                        state["state"][index] = {**state["state"][index], "step": torch.tensor(step)}
            return state

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            for group in self.param_groups:
                steps = [self.state[p].pop("step") for p in group["params"] if "step" in self.state[p]]
                if steps:
                    group["step"] = int(steps[0])

    return ResumableFusedAdam


def _muon_groups(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`groups`, with the matrices of attention and feed-forward layers in one of their own."""
    parts = (".attn.", ".ff.")
    inner = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and any(part in name for part in parts)}
    matrices = [p for p in groups[0]["params"] if id(p) in inner]
    rest = [p for p in groups[0]["params"] if id(p) not in inner]
    return [{**groups[0], "params": matrices, "muon": True}, {**groups[0], "params": rest}, groups[1]]


def learning_rate(config: OptimConfig, step: int, max_train_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0): a pure function, so that a resume needs no state."""
    rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    left = 1 - step / max_train_steps
    if config.lr_scheduler == "cosine":
        return rate * 0.5 * (1 - math.cos(math.pi * left))
    if config.lr_scheduler == "linear":
        return rate * min(1.0, left / max(config.lr_decay_ratio, 1e-9))
    return rate
