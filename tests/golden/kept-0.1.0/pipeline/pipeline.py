# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.
# Written by dit_hf when this pipeline was saved; it is not to be edited.
from __future__ import annotations

import sys

import diffusers

"""The latent Diffusion Transformer: DiT (Peebles & Xie, https://arxiv.org/abs/2212.09748) as a diffusers model."""


import contextlib
import json
import math
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_1d_rotary_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

# Sizes by name; those with a patch size in the name are DiT's (table 1 of the paper).
PRESETS: dict[str, dict[str, int]] = {
    name: {"patch_size": 2, "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim}
    for name, layers, heads, head_dim in (
        ("tiny", 6, 3, 64),
        ("reference", 10, 8, 96),
        ("S/2", 12, 6, 64),
        ("B/2", 12, 12, 64),
        ("L/2", 24, 16, 64),
        ("XL/2", 28, 16, 72),
    )
}


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Operations on `x`'s device in the precision of what they are given."""
    known = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if known else contextlib.nullcontext()


class LatentDiTLayerNorm(nn.LayerNorm):
    """Without a gain; in and out in the input's precision, where autocast would hand on float32: twice the bytes.

    torch's kernels sum half precision in float32.
    """

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6, elementwise_affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with without_autocast(x):
            return super().forward(x)


class LatentDiTRMSNorm(nn.RMSNorm):
    """Likewise, with a gain, in the input's precision too: torch's fused kernel takes no other."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with without_autocast(x):
            return nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LatentDiTAttnProcessor:
    """Self-attention through diffusers' dispatcher, so that `set_attention_backend` works."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (rotate(x, *image_rotary_emb) for x in (query, key))
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](hidden_states))


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn neighbours in each head of `x` [batch, tokens, heads, head_dim].

    `cosine` and `sine` are [tokens, head_dim], in the precision of `x`. diffusers' `apply_rotary_emb` does the same in
    float32, which in fp16 and bf16 brings a trained model's output no closer to float32's, and moves 2.6 times the
    memory.
    """
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    return x * cosine[:, None] + turned * sine[:, None]


class LatentDiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention over [batch, tokens, dim] with separate query, key and value projections."""

    _default_processor_cls = LatentDiTAttnProcessor
    _available_processors = [LatentDiTAttnProcessor]

    def __init__(self, dim: int, heads: int, qk_norm: str | None = None):
        super().__init__()
        self.heads = heads
        self.use_bias = True
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.norm_q = LatentDiTRMSNorm(dim // heads) if qk_norm else None
        self.norm_k = LatentDiTRMSNorm(dim // heads) if qk_norm else None
        AttentionModuleMixin.set_processor(self, LatentDiTAttnProcessor())

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        processor: Any = self.processor
        return processor(self, hidden_states, **kwargs)


class LatentDiTTransformerBlock(nn.Module):
    """The DiT block with adaLN-Zero (Peebles & Xie, section 3.2 and figure 3)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, qk_norm: str | None = None):
        super().__init__()
        self.norm1 = LatentDiTLayerNorm(dim)
        self.attn = LatentDiTAttention(dim, heads, qk_norm)
        self.norm2 = LatentDiTLayerNorm(dim)
        self.ff = FeedForward(dim, inner_dim=int(dim * mlp_ratio), activation_fn="gelu-approximate")
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`hidden_states` [batch, tokens, dim]; `temb` [batch, dim], already through SiLU.

        `image_rotary_emb`, where positions are rotary, is cosine and sine, each [tokens, head_dim].
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(temb).unsqueeze(1).chunk(6, dim=-1)
        attended = self.attn(self.norm1(hidden_states) * (1 + scale1) + shift1, image_rotary_emb=image_rotary_emb)
        hidden_states = hidden_states + gate1 * attended
        return hidden_states + gate2 * self.ff(self.norm2(hidden_states) * (1 + scale2) + shift2)


class LatentDiTTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin):
    r"""
    A Diffusion Transformer on latents, conditioned on any number of categorical labels, or on none.

    Args:
        sample_size: Height and width of the latents it is trained on, one number or two. Any size divisible by
            `patch_size` can be passed to `forward`; positions are then stretched over `position_base_size`.
        patch_size: Side of the square patches that become tokens.
        in_channels: Channels of the latents.
        out_channels: Channels of the output; None is `in_channels`, twice that is a learned sigma.
        num_layers: DiT blocks.
        num_attention_heads: Heads of attention.
        attention_head_dim: Width of a head; the model's width is `num_attention_heads * attention_head_dim`.
        mlp_ratio: Width of the feed-forward layer over the model's width.
        conditions: Name to number of values, e.g. `{"Smiling": 2, "Eyeglasses": 2}` or `{"class": 1000}`; None or an
            empty dict is the unconditional model. Each has one value more, the highest, that means "not given".
        timestep_freq_shift: 0 for the timestep frequencies of facebookresearch/DiT, 1 for those of diffusers'
            `DiTTransformer2DModel`.
        qk_norm: `rms_norm` normalises queries and keys head by head (https://arxiv.org/abs/2010.04245, with RMSNorm as
            in https://arxiv.org/abs/2403.03206), which keeps attention logits small in half precision; None does not.
        position_base_size: Height and width, in latents, of what positions are stretched over; None is `sample_size`.
            A model that goes on from one of another resolution keeps that one's.
        use_rotary_positional_embeddings: Beside the fixed positions that are added to the tokens, turn queries and
            keys by their column (the first half of each head) and row (the second), so that attention knows how far
            apart two tokens are (RoPE: https://arxiv.org/abs/2104.09864; by axes: https://arxiv.org/abs/2403.13298).

    Raises:
        ValueError: if the latents are not divisible by the patch, the width not by 4, or the width of a head not by 4
            where positions are rotary.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LatentDiTTransformerBlock"]
    _repeated_blocks = ["LatentDiTTransformerBlock"]
    _keep_in_fp32_modules = ["time_embedding"]
    _skip_layerwise_casting_patterns = ["proj_in", "time_embedding", "condition_embedding", "norm", "modulation"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 10,
        num_attention_heads: int = 8,
        attention_head_dim: int = 96,
        mlp_ratio: float = 4.0,
        conditions: dict[str, int] | None = None,
        timestep_freq_shift: float = 0.0,
        qk_norm: str | None = None,
        position_base_size: int | tuple[int, int] | None = None,
        use_rotary_positional_embeddings: bool = False,
    ):
        super().__init__()
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"sample_size {height}x{width} is not divisible by patch_size {patch_size}")
        dim = num_attention_heads * attention_head_dim
        if dim % 4:
            raise ValueError(f"the width {dim} (num_attention_heads * attention_head_dim) is not divisible by 4")
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm={qk_norm!r} is none of None, 'rms_norm'")
        if use_rotary_positional_embeddings and attention_head_dim % 4:
            raise ValueError(f"rotary positions need an attention_head_dim divisible by 4, not {attention_head_dim}")
        self.out_channels = in_channels if out_channels is None else out_channels
        self.inner_dim = dim
        base = (height, width) if position_base_size is None else position_base_size
        base_height, base_width = (base, base) if isinstance(base, int) else base
        self.base_grid = (base_height / patch_size, base_width / patch_size)

        # 1. Patches, timestep and conditions to the width of the model.
        self.proj_in = nn.Linear(in_channels * patch_size**2, dim)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=timestep_freq_shift)
        self.time_embedding = TimestepEmbedding(256, dim)
        # One table for all conditions; condition i owns the rows from condition_offsets[i], the last is its null.
        counts = [values + 1 for values in (conditions or {}).values()]
        self.condition_embedding: Any = nn.Embedding(sum(counts), dim) if counts else None
        offsets = [sum(counts[:i]) for i in range(len(counts))]
        self.register_buffer("condition_offsets", torch.tensor(offsets, dtype=torch.int64), persistent=False)
        nulls = [count - 1 for count in counts]
        self.register_buffer("null_condition_ids", torch.tensor(nulls, dtype=torch.int64), persistent=False)

        # 2. The blocks.
        self.transformer_blocks = nn.ModuleList(
            LatentDiTTransformerBlock(dim, num_attention_heads, mlp_ratio, qk_norm) for _ in range(num_layers)
        )

        # 3. Back to patches.
        self.norm_out = LatentDiTLayerNorm(dim)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, self.out_channels * patch_size**2)

        self.gradient_checkpointing = False
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        """Xavier for every linear layer, sd 0.02 for the embedders, zero for adaLN-Zero and the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.time_embedding.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_embedding.linear_2.weight, std=0.02)
        if self.condition_embedding is not None:
            nn.init.normal_(self.condition_embedding.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if "modulation" in name or "proj_out" in name:
                nn.init.zeros_(parameter)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        condition_ids: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """
        Args:
            hidden_states: Noisy latents, [batch, in_channels, height, width].
            timestep: [batch] or one number, fractions allowed.
            condition_ids: int64 [batch, conditions] in the order of the config; the highest value of each condition
                is its null; None is all null.
            return_dict: False for a plain tuple.

        Returns:
            `Transformer2DModelOutput` with `sample` [batch, out_channels, height, width].

        Raises:
            ValueError: if height or width is not divisible by the patch, or `condition_ids` has the wrong shape.
        """
        batch, channels, height, width = hidden_states.shape
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"latents of {height}x{width} are not divisible by patch_size {patch}")
        rows, columns = height // patch, width // patch

        # 1. Patchify: a token is one patch, channels first, as a convolution's weight would lay it out.
        hidden_states = hidden_states.reshape(batch, channels, rows, patch, columns, patch)
        hidden_states = hidden_states.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        hidden_states = self.proj_in(hidden_states)
        hidden_states = hidden_states + self._positions(rows, columns, hidden_states)
        rotary = self.config.use_rotary_positional_embeddings
        image_rotary_emb = self._rotations(rows, columns, hidden_states) if rotary else None

        # 2. What the blocks are modulated by.
        timestep = torch.as_tensor(timestep, device=hidden_states.device)
        timestep = timestep.expand(batch) if timestep.ndim == 0 or timestep.shape[0] == 1 else timestep
        temb = self.time_embedding(self.time_proj(timestep).to(self.time_embedding.linear_1.weight.dtype))
        if self.condition_embedding is not None:
            temb = temb + self._embed_conditions(condition_ids, batch)
        elif condition_ids is not None and condition_ids.shape[-1]:
            raise ValueError("condition_ids were given, but this model has no conditions")
        temb = nn.functional.silu(temb).to(hidden_states.dtype)

        # 3. Blocks.
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, temb, image_rotary_emb)
            else:
                hidden_states = block(hidden_states, temb, image_rotary_emb)

        # 4. Output, and unpatchify.
        shift, scale = self.modulation_out(temb).unsqueeze(1).chunk(2, dim=-1)
        hidden_states = self.proj_out(self.norm_out(hidden_states) * (1 + scale) + shift)
        hidden_states = hidden_states.reshape(batch, rows, columns, patch, patch, self.out_channels)
        sample = hidden_states.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.out_channels, height, width)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def to_json_string(self) -> str:
        """The config as JSON; diffusers sorts its keys, but the order of `conditions` is what `condition_ids` mean."""
        config = json.loads(super().to_json_string())
        config["conditions"] = dict(self.config.conditions) if self.config.conditions else None
        return json.dumps(config, indent=2) + "\n"

    def _embed_conditions(self, condition_ids: torch.Tensor | None, batch: int) -> torch.Tensor:
        if condition_ids is None:
            condition_ids = self.null_condition_ids.expand(batch, -1)
        elif condition_ids.shape != (batch, len(self.null_condition_ids)):
            expected = (batch, len(self.null_condition_ids))
            raise ValueError(f"condition_ids has shape {tuple(condition_ids.shape)}; expected {expected}")
        return self.condition_embedding(condition_ids + self.condition_offsets).sum(dim=1)

    def _positions(self, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
        """Fixed 2-D sin-cos positions [rows * columns, dim]: the first half of the width tells the column."""
        axes = []
        for position in self._axes(rows, columns, like.device):
            frequency = torch.arange(self.inner_dim // 4, device=like.device, dtype=torch.float32)
            frequency = torch.exp(frequency * (-4 * math.log(10000) / self.inner_dim))
            angle = position[:, None] * frequency
            axes.append(torch.cat([angle.sin(), angle.cos()], dim=-1))
        x = axes[0][None].expand(rows, -1, -1)
        y = axes[1][:, None].expand(-1, columns, -1)
        return torch.cat([x, y], dim=-1).flatten(0, 1).to(like.dtype)

    def _rotations(self, rows: int, columns: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of each token's angles, [rows * columns, head_dim]; neighbours in a head turn alike.

        The fastest frequency is one radian a token, the slowest nearly a hundredth of it.
        """
        x, y = self._axes(rows, columns, like.device)
        tokens = x.repeat(rows), y.repeat_interleave(columns, output_size=rows * columns)
        dim = self.config.attention_head_dim // 2
        (cos_x, sin_x), (cos_y, sin_y) = (get_1d_rotary_pos_embed(dim, p, theta=100.0, use_real=True) for p in tokens)
        return torch.cat([cos_x, cos_y], dim=-1).to(like.dtype), torch.cat([sin_x, sin_y], dim=-1).to(like.dtype)

    def _axes(self, rows: int, columns: int, device: torch.device) -> list[torch.Tensor]:
        """Where the columns are, and the rows, in tokens of the trained extent; float32 [columns] and [rows]."""
        extents = (columns, self.base_grid[1]), (rows, self.base_grid[0])
        return [torch.arange(n, device=device, dtype=torch.float32) * (base / n) for n, base in extents]


# What diffusers' feature caches (FirstBlockCache, ...) need to know about the block.
TransformerBlockRegistry.register(
    model_class=LatentDiTTransformerBlock,
    metadata=TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
)


"""The cosine noise schedule (Nichol & Dhariwal, https://arxiv.org/abs/2102.09672), by DPM-Solver++ or DDIM."""


import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

MAX_BETA = 0.999


@dataclass
class CosineLatentSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample: The sample one step nearer to the clean latent, the shape of the input.
        pred_original_sample: The clean latent as predicted at this step, the same shape.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class CosineLatentScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Timestep `t` in [0, T - 1], fractions allowed, is the noise level `u = (t + 1) / T` of the cosine schedule
    `alpha_bar(u) = cos^2((u + s) / (1 + s) * pi / 2) / cos^2(s / (1 + s) * pi / 2)` (Nichol & Dhariwal, eq. 17), with
    betas capped at 0.999 so that no level is pure noise. `t = 0` is the cleanest level that is trained.

    The config always carries `trained_betas` and the keys stock schedulers need, so that
    `DPMSolverMultistepScheduler.from_config(scheduler.config)` samples the same model; so do DDIM, UniPC, DEIS and
    Euler, and Heun with `use_exponential_sigmas=True`.

    Args:
        num_train_timesteps: T, the number of levels.
        cosine_s: s, the offset that keeps the first levels from being too clean.
        prediction_type: What the model predicts: `"sample"` (the clean latent), `"epsilon"` (the noise) or
            `"v_prediction"` (Salimans & Ho, https://arxiv.org/abs/2202.00512, section 4).
        trained_betas: The T betas of another schedule, to use instead of the cosine.
        clip_sample: Must be False: latents have no range to clip to.
        set_alpha_to_one: Must be True: the last step ends on the clean latent.
        timestep_spacing: Must be `"trailing"`: sampling begins at the noisiest level.
        steps_offset: Must be 0.
        multistep: True for DPM-Solver++ (2M), False for DDIM, which needs many more steps to end as near.

    Raises:
        ValueError: for an unknown `prediction_type`, betas that are not T numbers in (0, 1), or other fixed values.
    """

    _compatibles = [
        "DDIMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "UniPCMultistepScheduler",
    ]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 500,
        cosine_s: float = 0.008,
        prediction_type: str = "sample",
        trained_betas: list[float] | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        timestep_spacing: str = "trailing",
        steps_offset: int = 0,
        multistep: bool = True,
    ):
        if prediction_type not in ("sample", "epsilon", "v_prediction"):
            raise ValueError(f"prediction_type={prediction_type!r}; known are sample, epsilon, v_prediction")
        if clip_sample or not set_alpha_to_one or timestep_spacing != "trailing" or steps_offset:
            raise ValueError(
                "CosineLatentScheduler needs clip_sample=False, set_alpha_to_one=True, timestep_spacing='trailing' "
                "and steps_offset=0"
            )
        if trained_betas is None:
            trained_betas = cosine_betas(num_train_timesteps, cosine_s)
        # Keys noted as left at their default would be dropped when another class is made from this config.
        self.register_to_config(trained_betas=list(trained_betas), _use_default_values=[])
        self.betas = torch.tensor(trained_betas, dtype=torch.float32)
        if self.betas.shape != (num_train_timesteps,) or not ((self.betas > 0) & (self.betas < 1)).all():
            raise ValueError(f"trained_betas must be {num_train_timesteps} numbers between 0 and 1")
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        # Entry i + 1 of both tables is level i; entry 0 is the clean latent.
        clean = torch.ones(1)
        self._alphas = torch.cat([clean, self.alphas_cumprod]).sqrt()
        self._sigmas = torch.cat([1 - clean, 1 - self.alphas_cumprod]).sqrt()
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Spread `num_inference_steps` evenly from the noisiest level down ("trailing", https://arxiv.org/abs/2305.08891).

        Where the number does not divide T the timesteps are fractions, so the spacing stays even.

        Raises:
            ValueError: if it is not between 1 and T.
        """
        total = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= total:
            raise ValueError(f"num_inference_steps={num_inference_steps} must be between 1 and {total}")
        self.num_inference_steps = num_inference_steps
        steps = torch.arange(num_inference_steps + 1, dtype=torch.float64)
        schedule = (total - steps * total / num_inference_steps - 1).float()
        self.timesteps = schedule[:-1].to(device)
        # For `step`: the timesteps with the clean latent, -1, at their end; h / (2 h_last) of each, h being a step's
        # length in log(alpha / sigma), 0 where it is of the first order; and of the step before its place and the
        # clean latent predicted there.
        alpha, sigma = self.levels(schedule[:-1])
        lengths = (alpha.log() - sigma.log()).diff()
        momenta = torch.zeros(num_inference_steps)
        momenta[1:-1] = lengths[1:] / (2 * lengths[:-1])
        self._schedule, self._momenta = schedule.to(device), momenta.to(device)
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | float | None = None) -> torch.Tensor:
        """The input as it is: this schedule preserves the variance."""
        return sample

    def levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`alpha` and `sigma` (the square roots of alpha_bar and 1 - alpha_bar) at `timesteps` of any shape, float32.

        Between two levels the angle of (alpha, sigma) is interpolated, which on the cosine schedule is exact up to
        the chord's third order; -1 is the clean latent.
        """
        if self._alphas.device != timesteps.device:  # moved once, so that no step waits for a copy
            self._alphas, self._sigmas = self._alphas.to(timesteps.device), self._sigmas.to(timesteps.device)
        position = timesteps.to(torch.float32).clamp(-1, self.config.num_train_timesteps - 1) + 1
        low = position.floor()
        weight = position - low
        low, high = low.long(), position.ceil().long()
        # `take`, because indexing by a tensor of no dimension would wait for its value.
        alpha = torch.lerp(self._alphas.take(low), self._alphas.take(high), weight)
        sigma = torch.lerp(self._sigmas.take(low), self._sigmas.take(high), weight)
        norm = torch.where(weight > 0, torch.hypot(alpha, sigma), torch.ones_like(alpha))
        return alpha / norm, sigma / norm

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy latents `alpha x0 + sigma noise` at `timesteps` [batch] (or one for all)."""
        alpha, sigma = self._broadcast_levels(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The velocity `v = alpha noise - sigma x0` that a v-prediction model learns."""
        alpha, sigma = self._broadcast_levels(timesteps, sample)
        return alpha * noise - sigma * sample

    def predict_original_sample(
        self, model_output: torch.Tensor, timesteps: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """The clean latent that `model_output` at noisy `sample` stands for, by the config's `prediction_type`."""
        return self._predictions(model_output, sample, *self._broadcast_levels(timesteps, sample))[0]

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> CosineLatentSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step to the next of `timesteps`.

        With `multistep` and no `eta` it is DPM-Solver++ (2M) (Lu et al., https://arxiv.org/abs/2211.01095,
        algorithm 2): DDIM towards the clean latent that this prediction and the last one, extrapolated over the
        logarithm of the signal-to-noise ratio, lead to. Where the last call was not at the timestep before this one,
        and where the step ends on the clean latent, it is the first order: DDIM (Song et al.,
        https://arxiv.org/abs/2010.02502, eq. 12 and 16), as without `multistep` throughout.

        Args:
            model_output: What the model predicted, the shape of `sample`.
            timestep: The current one of `timesteps`.
            sample: The noisy latents.
            eta: 0 is deterministic, 1 is as noisy as DDPM (and first order).
            generator: For the noise when `eta` is above 0.
            variance_noise: That noise itself, instead of a generator.
            return_dict: False for the tuple `(prev_sample, pred_original_sample)`.

        Raises:
            ValueError: before `set_timesteps`, or for an `eta` outside [0, 1].
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} must be between 0 and 1")
        place, previous = self._places(timestep, sample.device)
        timestep = torch.as_tensor(timestep, device=sample.device, dtype=torch.float32)

        # 1. The clean latent and the noise that the prediction stands for.
        alpha, sigma = self._broadcast_levels(timestep, sample)
        original, noise = self._predictions(model_output, sample, alpha, sigma)
        # 2. The second order: the clean latent as it will have been predicted halfway, and the noise that fits it.
        last, self._last = self._last, (place, original)
        if self.config.multistep and eta == 0 and last is not None and last[1].shape == sample.shape:
            momentum = torch.where(last[0] == place - 1, self._momenta.take(place), 0.0)
            aim = original + momentum.to(sample.dtype) * (original - last[1])
            noise = (sample - alpha * aim) / sigma
        else:
            aim = original
        # 3. Back to the previous level, part of the noise fresh where eta asks for it.
        alpha_prev, sigma_prev = self._broadcast_levels(previous, sample)
        if eta > 0:
            ratio = (alpha / alpha_prev).square()
            fresh = eta * (sigma_prev / sigma) * (1 - ratio).clamp(min=0).sqrt()
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator, device=sample.device, dtype=sample.dtype)
            kept = (sigma_prev.square() - fresh.square()).clamp(min=0).sqrt()
            prev_sample = alpha_prev * original + kept * noise + fresh * variance_noise
        else:
            prev_sample = alpha_prev * aim + sigma_prev * noise
        if not return_dict:
            return prev_sample, original
        return CosineLatentSchedulerOutput(prev_sample=prev_sample, pred_original_sample=original)

    def reverse_step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        prev_sample: torch.Tensor,
    ) -> torch.Tensor:
        """The noisier sample at `timestep` from which a deterministic `step` leads to `prev_sample`.

        Exactly so if the model predicts `model_output` there. It was predicted at `sample`: calling both again with
        what this returns converges on the sample for which it holds. With (alpha, sigma) as a point at angle phi of
        the circle and v the velocity, a step is `x' = x cos(d) - v sin(d)` for the d between both angles, which is
        solved for x.

        Args:
            model_output: What the model predicted for `sample` at `timestep`.
            timestep: One of `timesteps`, the level to go to.
            sample: Near what is sought; `prev_sample` at first.
            prev_sample: The sample at the next lower of `timesteps` (the clean latent below the last).

        Raises:
            ValueError: before `set_timesteps`.
        """
        alpha, sigma = self._broadcast_levels(torch.as_tensor(timestep, dtype=torch.float32), sample)
        alpha_prev, sigma_prev = self._broadcast_levels(self._places(timestep, sample.device)[1], sample)
        original, noise = self._predictions(model_output, sample, alpha, sigma)
        velocity = alpha * noise - sigma * original
        sine, cosine = sigma * alpha_prev - alpha * sigma_prev, alpha * alpha_prev + sigma * sigma_prev
        return (prev_sample + velocity * sine) / cosine

    def _places(self, timestep: torch.Tensor | float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Where in `timesteps` a step is, and the next lower one, -1 below the last; on the device, nothing waits.

        A step is found by its timestep, so that a loop may begin anywhere.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        if self._schedule.device != device:
            self._schedule, self._momenta = self._schedule.to(device), self._momenta.to(device)
        place = (self._schedule[:-1] - torch.as_tensor(timestep, device=device)).abs().argmin()
        return place, self._schedule.take(place + 1)

    def _predictions(
        self, model_output: torch.Tensor, sample: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The clean latent and the noise, each by the formula that divides by nothing small where there is one."""
        if self.config.prediction_type == "sample":
            return model_output, (sample - alpha * model_output) / sigma
        if self.config.prediction_type == "epsilon":
            return (sample - sigma * model_output) / alpha, model_output
        return alpha * sample - sigma * model_output, alpha * model_output + sigma * sample

    def _broadcast_levels(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = self.levels(timesteps.to(like.device))
        shape = alpha.shape + (1,) * (like.ndim - alpha.ndim) if alpha.ndim else alpha.shape
        return alpha.reshape(shape).to(like.dtype), sigma.reshape(shape).to(like.dtype)


def cosine_betas(num_train_timesteps: int, cosine_s: float = 0.008) -> list[float]:
    """Betas of the cosine schedule, `1 - alpha_bar((i + 1) / T) / alpha_bar(i / T)`, capped at 0.999."""

    def alpha_bar(u: float) -> float:
        return math.cos((u + cosine_s) / (1 + cosine_s) * math.pi / 2) ** 2

    total = num_train_timesteps
    return [min(1 - alpha_bar((i + 1) / total) / alpha_bar(i / total), MAX_BETA) for i in range(total)]


"""Guidance: what is predicted at a step, for what is asked and for what it is led away from, and how it adds up."""


from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import torch


AttributeValue = bool | int | str | None
Attributes = Mapping[str, AttributeValue]


class GuidanceOptions(TypedDict, total=False):
    """What `guidance_scale` can be refined by, as further keywords of a call.

    Args:
        negative_attributes: What to steer away from, a dict or one an image; it takes the place of asking for nothing
            in classifier-free guidance.
        attribute_weights: Attributes that count more or less than 1: the difference that leaving one out makes is
            multiplied (as concepts are weighed in https://arxiv.org/abs/2206.01714). Each costs one more prediction.
        guidance_rescale: 0 to 1, how far the guided prediction is brought back to the standard deviation of the
            unguided one (https://arxiv.org/abs/2305.08891, section 3.4).
        guidance_start: Where guidance begins on the way from noise (0) to picture (1), in timesteps
            (https://arxiv.org/abs/2404.07724).
        guidance_end: Where it ends; steps without guidance cost half.
        guidance_transformer: Autoguidance (https://arxiv.org/abs/2406.02070): a smaller or earlier model of the same
            conditions, from whose prediction guidance leads away.
    """

    negative_attributes: Attributes | Sequence[Attributes] | None
    attribute_weights: Mapping[str, float] | None
    guidance_rescale: float
    guidance_start: float
    guidance_end: float
    guidance_transformer: LatentDiTTransformer2DModel | None


@dataclass
class Guidance:
    """How the predictions of a step are added up: each with a share, the shares adding up to 1.

    Args:
        asked: Condition ids of what is asked for, int64 [batch, conditions].
        share: That prediction's share where there is guidance; elsewhere it is the only one.
        others: Condition ids and share of each further prediction.
        elsewhere: Condition ids that are predicted for outside of the interval; None is `asked`.
        transformer: Makes the first of `others`; None is the pipeline's own.
        rescale: See `guidance_rescale`.
        start: See `guidance_start`.
        end: See `guidance_end`.
    """

    asked: torch.Tensor
    share: float = 1.0
    others: list[tuple[torch.Tensor, float]] = field(default_factory=list)
    elsewhere: torch.Tensor | None = None
    transformer: LatentDiTTransformer2DModel | None = None
    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def at(self, progress: float) -> tuple[torch.Tensor, list[tuple[torch.Tensor, float]]]:
        """`asked` and `others` of a step; `progress` is how far from noise to picture it begins."""
        if self.start <= progress + 1e-6 < self.end + 1e-6 * (self.end == 1):
            return self.asked, self.others
        return self.asked if self.elsewhere is None else self.elsewhere, []

    def combine(self, others: list[torch.Tensor], asked: torch.Tensor) -> torch.Tensor:
        """The guided prediction, of those for `others` and for `asked`, each [batch, channels, height, width]."""
        # As differences from the first, which is how the formula is written, and which rounds less.
        base = others[0]
        guided = base + self.share * (asked - base)
        for output, (_, share) in zip(others[1:], self.others[1:], strict=True):
            guided = guided + share * (output - base)
        if not self.rescale:
            return guided
        # https://arxiv.org/abs/2305.08891, equations 15 and 16.
        ratio = asked.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
        return guided * (self.rescale * ratio + 1 - self.rescale)


"""Images from a latent Diffusion Transformer, with or without attributes."""


import inspect
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor


# The pixels that go through the VAE at a time, which needs far more memory for a picture than the transformer.
VAE_PIXELS = 16 * 256 * 256


class LatentDiTPipeline(DiffusionPipeline):
    r"""
    Generates images with a [`LatentDiTTransformer2DModel`].

    Args:
        transformer: The denoiser.
        scheduler: A [`CosineLatentScheduler`], or one of diffusers' made with `from_config` of its config (see there).
        vae: An `AutoencoderKL`, `AutoencoderTiny` or `AutoencoderDC`, which decodes the latents; None leaves
            `output_type="latent"`.
        latents_mean: Mean of the VAE's latents by channel: the model works on `(latents - mean) / std`. None is the
            VAE's `shift_factor`, or 0.
        latents_std: Their standard deviation by channel; None is `1 / scaling_factor` of the VAE.
        guidance_scale: What a call without `guidance_scale` uses.
        condition_labels: Names of the values of a condition, e.g. `{"class": ["cat", "dog"]}`; conditions without an
            entry take booleans and numbers.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]
    _current_timestep: torch.Tensor | None = None
    _interrupt = False
    scheduler: SchedulerMixin

    def __init__(
        self,
        transformer: LatentDiTTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        guidance_scale: float = 1.0,
        condition_labels: dict[str, list[str]] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        channels = transformer.config.in_channels
        if latents_mean is None:
            latents_mean = [getattr(getattr(vae, "config", None), "shift_factor", None) or 0.0] * channels
        if latents_std is None:
            latents_std = [1 / getattr(getattr(vae, "config", None), "scaling_factor", 1.0)] * channels
        if not len(latents_mean) == len(latents_std) == channels:
            raise ValueError(f"latents_mean and latents_std must have {channels} numbers, one a channel")
        self.register_to_config(
            latents_mean=list(latents_mean),
            latents_std=list(latents_std),
            guidance_scale=guidance_scale,
            condition_labels=condition_labels or {},
        )
        config = getattr(vae, "config", {})
        blocks = config.get("encoder_block_out_channels") or config.get("block_out_channels") or [0]
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=2 ** (len(blocks) - 1), resample="bicubic", do_convert_rgb=True
        )

    @torch.no_grad()
    def __call__(
        self,
        attributes: Attributes | Sequence[Attributes] | None = None,
        batch_size: int = 1,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' spelling)
        **guidance_options: Unpack[GuidanceOptions],
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate images.

        Args:
            attributes: What to ask for, a dict (`{"Smiling": True, "Eyeglasses": False}`, `{"class": "cat"}`) or a
                list of dicts, one an image. Names left out are not asked for; None asks for nothing.
            batch_size: Number of images when `attributes` is None or one dict.
            num_images_per_prompt: Images for each row of attributes.
            num_inference_steps: Denoising steps.
            guidance_scale: Classifier-free guidance (https://arxiv.org/abs/2207.12598), 1 is none; None is the value
                in the pipeline's config. It has no effect where nothing is asked for.
            eta: 0 is deterministic, 1 as noisy as DDPM; only schedulers that know it use it.
            generator: For the first noise and that of `eta`; a list has one for each image.
            latents: The first noise itself, [images, channels, height, width], unit variance; sets the size too.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"` (the model's normalised latents).
            return_dict: False for the tuple `(images,)`.
            callback_on_step_end: Called as `f(pipeline, step, timestep, tensors)` after each step; may return changed
                tensors.
            callback_on_step_end_tensor_inputs: Which tensors it gets.
            guidance_options: See `GuidanceOptions`.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: for unknown attributes, values or options that do not fit together.
        """
        # 1. Check inputs.
        self._check_inputs(attributes, batch_size, output_type, callback_on_step_end_tensor_inputs)
        rows = self._rows(attributes, batch_size, num_images_per_prompt)
        options = (attributes is not None, guidance_scale, num_images_per_prompt)
        guidance = self._prepare_guidance(rows, *options, **guidance_options)

        # 2. Noise, and the timesteps.
        device = self._execution_device
        latents = self._prepare_latents(len(rows), generator, latents, device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents * self.scheduler.init_noise_sigma

        # 3. Denoise.
        on_step_end = (callback_on_step_end, callback_on_step_end_tensor_inputs)
        latents = self._denoise(latents, self.scheduler.timesteps, guidance, eta, generator, *on_step_end)

        # 4. Decode.
        return self._output(latents, output_type, return_dict)

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The timestep of the step under way, which some of diffusers' caches ask for."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether the rest of the steps is left out: a callback sets `pipeline._interrupt`, as diffusers documents."""
        return self._interrupt

    def encode_attributes(
        self, attributes: Attributes | Sequence[Attributes] | None, batch_size: int = 1
    ) -> torch.Tensor:
        """Condition ids, int64 [rows, conditions] in the order of the transformer's config; see `__call__`.

        Raises:
            ValueError: for a name or value that the model does not know, listing those it knows.
        """
        rows = self._rows(attributes, batch_size)
        conditions = self.transformer.config.conditions or {}
        ids = torch.tensor([list(conditions.values())] * len(rows), dtype=torch.int64)  # all null
        names = list(conditions)
        for row, wanted in enumerate(rows):
            for name, value in (wanted or {}).items():
                if name not in conditions:
                    known = ", ".join(names) or "none, this model is unconditional"
                    raise ValueError(f"attribute {name!r} is unknown; known are {known}")
                ids[row, names.index(name)] = self._value_id(name, value, conditions[name])
        return ids

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Images of the model's normalised latents [batch, channels, height, width], as `output_type` says.

        Raises:
            ValueError: if they are beyond what the VAE's precision holds.
        """
        mean, std = self._statistics(latents.device)
        latents = (latents.float() * std + mean).to(self.vae.dtype)
        parts = self._vae_parts(latents, self.image_processor.config.vae_scale_factor)
        pixels = torch.cat([self.vae.decode(part).sample for part in parts])
        if not torch.isfinite(pixels).all():
            dtype = str(self.vae.dtype).removeprefix("torch.")
            raise ValueError(f"decoded pictures are not finite: does the VAE need more than {dtype}? pipe.vae.float()")
        return self.image_processor.postprocess(pixels, output_type=output_type)

    def _vae_parts(self, images: torch.Tensor, factor: int = 1) -> tuple[torch.Tensor, ...]:
        """Images [batch, channels, height, width], or latents of a side `factor` times smaller, a few at a time."""
        return images.split(max(1, VAE_PIXELS // (images[0, 0].numel() * factor**2)))

    @torch.no_grad()
    def interpolate(
        self,
        num_frames: int = 16,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        attributes: Attributes | None = None,
        **options: Any,
    ) -> list[Any]:
        r"""
        Frames between noises: each the picture of a point on the arc from one noise to the next.

        Args:
            num_frames: Frames from one noise to the next, both ends included.
            latents: The noises, [two or more, channels, height, width]; None draws two.
            generator: For those.
            attributes: What to ask for in every frame.
            options: Of a call.

        Returns:
            The pictures, `num_frames` of them and `num_frames - 1` more for each noise beyond the second.

        Raises:
            ValueError: for less than two frames or noises.
        """
        if latents is None:
            latents = self.draw_noise(2, generator)
        frames = interpolate_noises(latents, num_frames)
        options |= {"latents": frames, "return_dict": False}
        return LatentDiTPipeline.__call__(self, attributes, len(frames), **options)[0]

    def draw_noise(
        self, batch_size: int = 1, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Noise of the size that the model was trained on, [batch_size, channels, height, width]; see `latents`."""
        size, channels = self.transformer.config.sample_size, self.transformer.config.in_channels
        return self._noise((batch_size, channels, *((size, size) if isinstance(size, int) else size)), generator)

    @property
    def components(self) -> dict[str, Any]:
        """All that `__init__` takes: another of the pipelines made with it works on the same latents."""
        return {**super().components, **super().parameters}

    @property
    def parameters(self) -> dict[str, Any]:
        """Nothing: what diffusers keeps here is among the `components`."""
        return {}

    def to_json_string(self) -> str:
        """The index as JSON, so that `DiffusionPipeline.from_pretrained` finds every class after `import dit_hf`.

        It is that of a [`LatentDiTPipeline`] for those that are made of its parts too, so that it loads everywhere.
        """
        index = json.loads(super().to_json_string())
        index["_class_name"] = LatentDiTPipeline.__name__
        index.pop("_name_or_path", None)
        for name, value in index.items():
            if (
                isinstance(value, list)
                and len(value) == 2
                and str(value[0]).startswith(("dit_hf.", "diffusers_modules."))
            ):
                index[name] = ["diffusers", value[1]]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the index, and beside it `pipeline.py`, with which it loads where dit_hf is not installed.

        The components, saved before it, are not to tell either where they were loaded from.
        """
        for path in Path(save_directory).glob("*/*config.json"):
            config = json.loads(path.read_text(encoding="utf-8"))
            if config.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / "pipeline.py").write_text(standalone_source(), encoding="utf-8")
        super().save_config(save_directory, push_to_hub, **kwargs)

    def _statistics(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's latents by channel, [1, channels, 1, 1]."""
        mean, std = (
            torch.tensor(values, device=device, dtype=torch.float32).view(1, -1, 1, 1)
            for values in (self.config.latents_mean, self.config.latents_std)
        )
        return mean, std

    def _check_inputs(
        self,
        attributes: Attributes | Sequence[Attributes] | None,
        batch_size: int,
        output_type: str,
        tensor_inputs: list[str],
    ) -> None:
        rows = [attributes] if attributes is None or isinstance(attributes, Mapping) else attributes
        if not isinstance(rows, list | tuple) or not all(row is None or isinstance(row, Mapping) for row in rows):
            raise ValueError(f"attributes={attributes!r} must be a dict like {{'Smiling': True}}, or a list of dicts")
        if isinstance(attributes, Sequence) and batch_size not in (1, len(attributes)):
            raise ValueError(f"batch_size={batch_size}, but attributes has {len(attributes)} rows; leave one out")
        if batch_size < 1 or (attributes is not None and len(rows) == 0):
            raise ValueError("at least one image must be asked for")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} is unknown; known are pil, np, pt, latent")
        if output_type != "latent" and self.vae is None:
            raise ValueError("this pipeline has no vae; ask for output_type='latent'")
        unknown = set(tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs {sorted(unknown)} not in {self._callback_tensor_inputs}"
            )

    def _value_id(self, name: str, value: AttributeValue, count: int) -> int:
        if value is None:
            return count  # the null value
        labels = self.config.condition_labels.get(name)
        if isinstance(value, str):
            if labels is None or value not in labels:
                known = ", ".join(labels) if labels else f"0 to {count - 1}"
                raise ValueError(f"{name}={value!r} is unknown; known are {known}")
            return labels.index(value)
        try:
            number = int(value)
        except (TypeError, ValueError):  # of lists and the like
            number = -1
        if number != value or not 0 <= number < count:
            raise ValueError(f"{name}={value} is none of the numbers between 0 and {count - 1}")
        return number

    def _prepare_latents(
        self,
        batch: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        if latents is None:
            return self.draw_noise(batch, generator)
        channels = self.transformer.config.in_channels
        if latents.ndim != 4 or latents.shape[:2] != (batch, channels):
            expected = f"[{batch}, {channels}, height, width]"
            raise ValueError(f"latents has shape {list(latents.shape)}; expected {expected}")
        return latents.to(device=device, dtype=torch.float32)

    def _noise(self, shape: Sequence[int], generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
        """float32, on the device; a list of generators has one for each image."""
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} images")
        return randn_tensor(tuple(shape), generator, device=self._execution_device, dtype=torch.float32)

    @staticmethod
    def _rows(
        attributes: Attributes | Sequence[Attributes] | None, batch_size: int, each: int = 1
    ) -> list[Attributes]:
        """One row of attributes an image, `each` of them in succession for one of `attributes`."""
        if each < 1:
            raise ValueError(f"num_images_per_prompt={each} must be at least 1")
        rows = [attributes] * batch_size if attributes is None or isinstance(attributes, Mapping) else attributes
        return [row or {} for row in rows for _ in range(each)]

    def _prepare_guidance(
        self,
        rows: Sequence[Attributes],
        conditional: bool,
        guidance_scale: float | None = None,
        each: int = 1,
        negative_attributes: Attributes | Sequence[Attributes] | None = None,
        attribute_weights: Mapping[str, float] | None = None,
        guidance_rescale: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        guidance_transformer: LatentDiTTransformer2DModel | None = None,
    ) -> Guidance:
        """What is predicted at every step, and with which shares.

        Args:
            rows: One an image, `each` of them in succession for one of the call's.
            conditional: Whether anything is asked for.
            guidance_scale: None is the config's.
            each: Images for each row of the call.
            negative_attributes: This and the following are `GuidanceOptions`.

        Raises:
            ValueError: for unknown attributes, or options out of their range.
        """
        for name, value in (("rescale", guidance_rescale), ("start", guidance_start), ("end", guidance_end)):
            if not 0 <= value <= 1:
                raise ValueError(f"guidance_{name}={value} must be between 0 and 1")
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        asked, device = self.encode_attributes(rows), self._execution_device
        guidance = Guidance(asked.to(device), rescale=guidance_rescale, start=guidance_start, end=guidance_end)
        negative, weak = negative_attributes, guidance_transformer
        # 1. Away from the negative, or from what another model predicts.
        if scale != 1 and (weak is not None or (asked.shape[1] > 0 and (conditional or negative is not None))):
            repeated = self._rows(negative, len(rows) // each, each)
            negative_rows = rows if negative is None and weak is not None else repeated
            if len(negative_rows) != len(rows):
                raise ValueError(f"{len(negative_rows)} rows of negative_attributes for {len(rows)} images")
            guidance.share, guidance.transformer = scale, weak
            guidance.others.append((self.encode_attributes(negative_rows).to(device), 1 - scale))
        # 2. Further towards what some of the attributes make of it.
        for name, weight in (attribute_weights or {}).items():
            without = [{key: value for key, value in row.items() if key != name} for row in rows]
            if without == list(rows):
                raise ValueError(f"attribute_weights has {name!r}, which no image is asked for")
            extra = scale * (weight - 1)
            guidance.share += extra
            guidance.others.append((self.encode_attributes(without).to(device), -extra))
        return guidance

    def _denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        guidance: Guidance,
        eta: float,
        generator: torch.Generator | list[torch.Generator] | None,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        after_step: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """From noisy latents at the first of `timesteps` to those after the last; `after_step` may change them."""
        step_options = self._step_options(eta, generator)
        self._num_timesteps, self._interrupt = len(timesteps), False
        self._reset_caches(guidance)
        progress = (1 - (timesteps.float() + 1) / self.scheduler.config.num_train_timesteps).tolist()
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    break
                self._current_timestep = t
                model_input = self.scheduler.scale_model_input(latents, t)
                model_output = self._predict(model_input, t, guidance, progress[i])
                latents = self.scheduler.step(model_output, t, latents, **step_options, return_dict=False)[0]
                if after_step is not None:
                    latents = after_step(i, latents)
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", latents)
                progress_bar.update()
        self._current_timestep = None
        return latents

    def _predict(
        self, model_input: torch.Tensor, timestep: torch.Tensor, guidance: Guidance, progress: float
    ) -> torch.Tensor:
        """The model's output after guidance, all of a model's predictions in one batch; a learned sigma is dropped."""
        asked_ids, others = guidance.at(progress)
        own = others if guidance.transformer is None else others[1:]
        outputs = self._run(self.transformer, model_input, timestep, [*(ids for ids, _ in own), asked_ids])
        if not others:
            return outputs[0]
        asked = outputs.pop()
        if len(own) < len(others):
            outputs = self._run(guidance.transformer, model_input, timestep, [others[0][0]]) + outputs
        return guidance.combine(outputs, asked)

    def _run(
        self, transformer: Any, model_input: torch.Tensor, timestep: torch.Tensor, condition_ids: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """A prediction for each entry of `condition_ids`.

        The model may be half precision; latents, guidance and steps stay in float32, which costs nothing beside it.
        """
        count, device = len(condition_ids), model_input.device
        inputs = torch.cat([model_input] * count)
        ids, timesteps = torch.cat(condition_ids), timestep.to(device).expand(len(inputs))
        # Caches keep what they know by the number of predictions, which differs outside of guidance's interval.
        with transformer.cache_context(f"{count} predictions"):
            output = transformer(inputs.to(transformer.dtype), timesteps, ids, return_dict=False)[0]
        return list(output[:, : transformer.config.in_channels].to(model_input.dtype).chunk(count))

    def _reset_caches(self, guidance: Guidance) -> None:
        """diffusers' caches forget the last series of steps."""
        for transformer in (self.transformer, guidance.transformer):
            if transformer is not None:
                transformer._reset_stateful_cache()

    def _output(self, latents: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        images = latents if output_type == "latent" else self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _step_options(self, eta: float, generator: torch.Generator | list[torch.Generator] | None) -> dict[str, Any]:
        """Those of `eta` and `generator` that the scheduler in use takes."""
        known = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in known}


def standalone_source() -> str:
    """Transformer, scheduler and pipeline as one module, which loads them where dit_hf is not installed.

    `from_pretrained(..., custom_pipeline="pipeline", trust_remote_code=True)` runs it, and it makes the three known to
    diffusers, as importing dit_hf does. A pipeline that was loaded so saves the same module again.
    """
    classes = (LatentDiTTransformer2DModel, CosineLatentScheduler, LatentDiTPipeline)
    parts = (*classes[:2], Guidance, classes[2])
    sources = [Path(file).read_text(encoding="utf-8") for file in dict.fromkeys(map(inspect.getfile, parts))]
    if len(sources) == 1:
        return sources[0]
    own = re.compile(r"^(# Copyright.*|from (__future__|\.\S+) import (\([^)]*\)|.*))\n", re.MULTILINE)
    names = ", ".join(kind.__name__ for kind in classes)
    return (
        "# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.\n"
        "# Written by dit_hf when this pipeline was saved; it is not to be edited.\n"
        "from __future__ import annotations\n\nimport sys\n\nimport diffusers\n\n"
        + "\n\n".join(own.sub("", source).strip() + "\n" for source in sources)
        + '\n\nif "dit_hf" not in sys.modules:  # which has made its own known\n'
        f"    vars(diffusers).update({{kind.__name__: kind for kind in ({names})}})\n"
    )


def slerp(start: torch.Tensor, end: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Points on the arc between two noises (Shoemake 1985), [len(weights), ...]: noises as likely as they are.

    Args:
        start: The noise at weight 0.
        end: The noise at weight 1, the same shape.
        weights: Between 0 and 1.
    """
    # In double precision, which not every device has.
    first, last = (noise.flatten().cpu().double() for noise in (start, end))
    angle = torch.nn.functional.cosine_similarity(first, last, dim=0).clamp(-1, 1).acos().to(start)
    weights = weights.to(start.dtype).reshape(-1, *[1] * start.ndim)
    if angle < 1e-4:
        return torch.lerp(start[None], end[None], weights)
    return (((1 - weights) * angle).sin() * start + (weights * angle).sin() * end) / angle.sin()


def interpolate_noises(noises: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Points on the arcs from each noise to the next, `num_frames` an arc with both ends, which are not repeated.

    Raises:
        ValueError: for less than two frames or noises.
    """
    if num_frames < 2 or len(noises) < 2:
        raise ValueError(f"{len(noises)} noises and {num_frames} frames; at least two of both are needed")
    weights = torch.linspace(0, 1, num_frames, device=noises.device)
    arcs = [slerp(start, end, weights[:-1]) for start, end in itertools.pairwise(noises)]
    return torch.cat([*arcs, noises[-1:]])


if "dit_hf" not in sys.modules:  # which has made its own known
    vars(diffusers).update({kind.__name__: kind for kind in (LatentDiTTransformer2DModel, CosineLatentScheduler, LatentDiTPipeline)})
