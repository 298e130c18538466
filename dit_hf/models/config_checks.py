# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.
"""Checks of a transformer's config, which may come from anywhere: absurd values would take hours or all memory."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

# Categories of Unicode: control characters, lone surrogates, separators of lines and paragraphs.
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")


def check_transformer_config(config: Mapping[str, Any]) -> None:
    """Check every value of the config of a `LatentDiTTransformer2DModel`.

    Raises:
        ValueError: naming the first value that is of another type, out of range, or does not fit the others.
    """
    # 1. Each value by itself.
    for name, most in (
        ("patch_size", 10_000),
        ("in_channels", 10_000),
        ("num_layers", 1_000),
        ("num_attention_heads", 1_000),
        ("attention_head_dim", 10_000),
    ):
        _check_whole(name, config[name], most)
    if config["out_channels"] is not None:
        _check_whole("out_channels", config["out_channels"], 20_000)
    _check_size("sample_size", config["sample_size"])
    if config["position_base_size"] is not None:
        _check_size("position_base_size", config["position_base_size"])
    _check_number("mlp_ratio", config["mlp_ratio"], 0.01, 100)
    _check_number("timestep_freq_shift", config["timestep_freq_shift"], 0, 100)
    if config["qk_norm"] not in (None, "rms_norm"):
        raise ValueError(f"expected qk_norm=None or 'rms_norm', got {config['qk_norm']!r}")
    rotary = config["use_rotary_positional_embeddings"]
    if not isinstance(rotary, bool):
        raise ValueError(f"expected use_rotary_positional_embeddings to be true or false, got {rotary!r}")
    _check_conditions(config["conditions"])

    # 2. What must divide what. Half of a head's features rotate by column, half by row, each half in pairs.
    size, patch, head_dim = config["sample_size"], config["patch_size"], config["attention_head_dim"]
    height, width = (size, size) if isinstance(size, int) else size
    if height % patch or width % patch:
        raise ValueError(f"sample_size {height}x{width} is not divisible by patch_size {patch}")
    dim = config["num_attention_heads"] * head_dim
    if dim % 4:
        raise ValueError(f"the width {dim} (num_attention_heads * attention_head_dim) is not divisible by 4")
    if rotary and head_dim % 4:
        raise ValueError(f"rotary positions need an attention_head_dim divisible by 4, got {head_dim}")


def _check_whole(name: str, value: Any, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"expected {name} from 1 to {most:,}, got {value!r}")


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    # NaN fails every comparison.
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"expected {name} from {least} to {most}, got {value!r}")


def _check_size(name: str, value: Any) -> None:
    """Check a size in latents: a whole number, or height and width."""
    sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    for side in sides:
        _check_whole(name, side, 10_000)


def _check_conditions(conditions: Any) -> None:
    if conditions is None:
        return
    if not isinstance(conditions, Mapping):
        raise ValueError(f"expected conditions to be a dict such as {{'Smiling': 2}}, got {conditions!r:.80}")
    for name, values in conditions.items():
        if not isinstance(name, str) or any(unicodedata.category(letter) in _UNPRINTABLE for letter in name):
            raise ValueError(
                f"the name of a condition, {name!r:.80}, holds characters that cannot be printed; rename it"
            )
        _check_whole(f"the values of condition {name!r:.80}", values, 10_000_000)
    _check_whole("all values of all conditions", sum(conditions.values()) or 1, 10_000_000)
