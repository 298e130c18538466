"""The latent Diffusion Transformer: DiT (Peebles & Xie, https://arxiv.org/abs/2212.09748) as a diffusers model."""

from __future__ import annotations

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


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Operations on `x`'s device in the precision of what they are given."""
    # Not torch.amp.is_autocast_available: torch.compile cannot trace it before torch 2.12. Only meta has no autocast.
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


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
            query, key = (apply_rotary_emb(x, *image_rotary_emb) for x in (query, key))
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](hidden_states))


def apply_rotary_emb(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
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
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            self.modulation(temb).unsqueeze(1).chunk(6, dim=-1)
        )
        attended = self.attn(
            self.norm1(hidden_states) * (1 + scale_msa) + shift_msa, image_rotary_emb=image_rotary_emb
        )
        hidden_states = hidden_states + gate_msa * attended
        return hidden_states + gate_mlp * self.ff(self.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp)


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
