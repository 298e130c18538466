"""The latent Diffusion Transformer: DiT (Peebles & Xie, https://arxiv.org/abs/2212.09748) as a diffusers model."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config

# A private module of diffusers 0.42.1, which has no public way to describe a block to the feature caches.
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_1d_rotary_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..short_card import TRANSFORMER_CARD, ShortCardMixin
from .adapters import LatentDiTAdapterMixin
from .config_checks import check_transformer_config


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which operations on `x`'s device keep the precision of their inputs."""
    # torch.amp.is_autocast_available would be the general test, but torch.compile cannot trace it before torch 2.12.
    # Only the meta device has no autocast.
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Return a size in a config, one number for a square or (height, width), as (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


class LatentDiTLayerNorm(nn.LayerNorm):
    """Layer norm without a gain that returns the input's precision.

    Autocast would return float32, which is twice the memory traffic in half precision and gains nothing: torch's
    kernels accumulate in float32 anyway.
    """

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6, elementwise_affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with without_autocast(x):
            return super().forward(x)


class LatentDiTRMSNorm(nn.RMSNorm):
    """RMS norm with a gain that returns the input's precision.

    The gain is cast to it, because torch's fused kernel requires both to have the same precision.
    """

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with without_autocast(x):
            return nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LatentDiTAttnProcessor:
    """Self-attention through diffusers' dispatcher, so that `set_attention_backend` works."""

    # `set_attention_backend` and `enable_parallelism` of diffusers 0.42.1 set these two.
    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        # 1. Project, and split into heads.
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)  # each [batch, tokens, dim]
        else:
            query = attn.to_q(hidden_states)  # [batch, tokens, dim]
            key = attn.to_k(hidden_states)
            value = attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        # each [batch, tokens, heads, head_dim]

        # 2. Normalise before rotating: a rotation keeps the norm, but the gain of the norm does not commute with it.
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, *image_rotary_emb) for x in (query, key))

        # 3. Attend, and join the heads. Diffusers has `parallel_config` only from 0.36 on.
        parallel: dict[str, Any] = {} if self._parallel_config is None else {"parallel_config": self._parallel_config}
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, **parallel
        )  # [batch, tokens, heads, head_dim]
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)  # [batch, tokens, dim]
        return attn.to_out[1](attn.to_out[0](hidden_states))  # [batch, tokens, dim]


def apply_rotary_emb(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of neighbouring features in each head of `x` [batch, tokens, heads, head_dim].

    `cosine` and `sine` are [tokens, head_dim], in the precision of `x`. diffusers' `apply_rotary_emb` does the same in
    float32, which in fp16 and bf16 brings a trained model's output no closer to float32's, and moves 2.6 times the
    memory.
    """
    pairs = x.unflatten(-1, (-1, 2))  # [batch, tokens, heads, head_dim / 2, 2]
    quarter_turn = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)  # the shape of x
    return x * cosine[:, None] + quarter_turn * sine[:, None]  # [tokens, 1, head_dim] broadcasts over the heads


class LatentDiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention over [batch, tokens, dim] with separate query, key and value projections."""

    # The names that `AttentionModuleMixin` of diffusers 0.42.1 reads.
    _default_processor_cls = LatentDiTAttnProcessor
    _available_processors = [LatentDiTAttnProcessor]
    is_cross_attention = False  # read by the hooks that skip or perturb attention

    def __init__(self, dim: int, heads: int, qk_norm: str | None = None):
        super().__init__()
        self.heads = heads
        self.use_bias = True  # `fuse_projections` gives the fused layer a bias only if this is set
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.norm_q = LatentDiTRMSNorm(dim // heads) if qk_norm else None
        self.norm_k = LatentDiTRMSNorm(dim // heads) if qk_norm else None
        # Through the class, because mypy takes `self.set_processor` for one of nn.Module's tensors.
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
        """Add attention and feed-forward to `hidden_states` [batch, tokens, dim], modulated by `temb`.

        Args:
            hidden_states: The tokens, [batch, tokens, dim].
            temb: Timestep and conditions, [batch, dim], SiLU already applied: once for all blocks.
            image_rotary_emb: Cosine and sine of rotary positions, each [tokens, head_dim]; None without them.
        """
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            self.modulation(temb).unsqueeze(1).chunk(6, dim=-1)
        )  # each [batch, 1, dim], which broadcasts over the tokens

        # 1. Attention.
        modulated = self.norm1(hidden_states) * (1 + scale_msa) + shift_msa  # [batch, tokens, dim]
        attention = self.attn(modulated, image_rotary_emb=image_rotary_emb)  # [batch, tokens, dim]
        hidden_states = hidden_states + gate_msa * attention  # [batch, tokens, dim]

        # 2. Feed-forward.
        modulated = self.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp  # [batch, tokens, dim]
        return hidden_states + gate_mlp * self.ff(modulated)  # [batch, tokens, dim]


class LatentDiTTransformer2DModel(ShortCardMixin, LatentDiTAdapterMixin, ModelMixin, ConfigMixin, CacheMixin):
    r"""
    A Diffusion Transformer on latents, conditioned on any number of categorical labels, or on none.

    Args:
        sample_size: Size of the latents that the model is trained on, one number for a square or (height, width).
            Any size divisible by `patch_size` can be passed to `forward`; positions are then stretched over
            `position_base_size`.
        patch_size: Side of the square patches that become tokens.
        in_channels: Channels of the latents.
        out_channels: Channels of the output; None is `in_channels`, twice that is a learned sigma.
        num_layers: DiT blocks.
        num_attention_heads: Heads of attention.
        attention_head_dim: Width of a head; the model's width is `num_attention_heads * attention_head_dim`.
        mlp_ratio: Width of the feed-forward layer over the model's width.
        conditions: Name to number of values, e.g. `{"Smiling": 2, "Eyeglasses": 2}` or `{"class": 1000}`; None or an
            empty dict is the unconditional model. Each has one more value, the highest, which is the null condition.
        timestep_freq_shift: 0 for the timestep frequencies of facebookresearch/DiT, 1 for those of diffusers'
            `DiTTransformer2DModel`.
        qk_norm: `rms_norm` normalises queries and keys head by head (https://arxiv.org/abs/2010.04245, with RMSNorm as
            in https://arxiv.org/abs/2403.03206), which keeps attention logits small in half precision; None does not.
        position_base_size: Size, in latents, of the extent that positions are stretched over; None is `sample_size`.
            A model that is initialized from one of another resolution keeps the extent of that one.
        use_rotary_positional_embeddings: In addition to the fixed positions that are added to the tokens, rotate
            queries and keys by their column (the first half of each head) and row (the second), so that attention
            sees how far apart two tokens are (RoPE: https://arxiv.org/abs/2104.09864; by axes:
            https://arxiv.org/abs/2403.13298).

    Raises:
        ValueError: if a value is of another type or out of range, `sample_size` is not divisible by `patch_size`, the
            model's width is not divisible by 4, or with rotary positions `attention_head_dim` is not divisible by 4.
    """

    # The names from which ModelMixin of diffusers 0.42.1 reads what a model supports.
    _card = TRANSFORMER_CARD
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
        # 1. Check the config, and derive sizes.
        check_transformer_config(self.config)
        dim = num_attention_heads * attention_head_dim
        self.out_channels = in_channels if out_channels is None else out_channels
        self.inner_dim = dim
        base_height, base_width = height_and_width(sample_size if position_base_size is None else position_base_size)
        self.base_grid = (base_height / patch_size, base_width / patch_size)

        # 2. Patches, timestep and conditions to the width of the model.
        self.proj_in = nn.Linear(in_channels * patch_size**2, dim)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=timestep_freq_shift)
        self.time_embedding = TimestepEmbedding(256, dim)
        # One table for all conditions: the rows of condition i begin at condition_offsets[i], its last is its null.
        counts = [values + 1 for values in (conditions or {}).values()]
        self.condition_embedding: Any = nn.Embedding(sum(counts), dim) if counts else None
        offsets = [0, *itertools.accumulate(counts)][: len(counts)]
        self.register_buffer("condition_offsets", torch.tensor(offsets, dtype=torch.int64), persistent=False)
        nulls = [count - 1 for count in counts]
        self.register_buffer("null_condition_ids", torch.tensor(nulls, dtype=torch.int64), persistent=False)

        # 3. The blocks.
        self.transformer_blocks = nn.ModuleList(
            LatentDiTTransformerBlock(dim, num_attention_heads, mlp_ratio, qk_norm) for _ in range(num_layers)
        )

        # 4. Back to patches.
        self.norm_out = LatentDiTLayerNorm(dim)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, self.out_channels * patch_size**2)

        self.gradient_checkpointing = False
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        """Initialize as DiT does (Peebles & Xie, section 3.2, and the code of facebookresearch/DiT)."""
        # Xavier for all linear layers first; the special cases below replace it.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # A standard deviation of 0.02 for the embeddings of timestep and conditions.
        nn.init.normal_(self.time_embedding.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_embedding.linear_2.weight, std=0.02)
        if self.condition_embedding is not None:
            nn.init.normal_(self.condition_embedding.weight, std=0.02)
        # adaLN-Zero: with gates of zero every block begins as the identity, and the model predicts zero.
        for name, parameter in self.named_parameters():
            if "modulation" in name or "proj_out" in name:
                nn.init.zeros_(parameter)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents that the model is trained on."""
        return height_and_width(self.config.sample_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        condition_ids: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """
        Predict from noisy latents the scheduler's `prediction_type`: the clean latents, the noise or the velocity.

        Args:
            hidden_states: Noisy latents, [batch, in_channels, height, width].
            timestep: [batch] or one number for all; fractions are allowed.
            condition_ids: int64 [batch, conditions] in the order of the config; the highest value of each condition
                is its null; None is all null.
            return_dict: False returns the tuple `(sample,)`.

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

        # 1. Patchify: one patch is one token. Its channels come first, as in the weight of the convolution that other
        #    DiT code has here, so that checkpoints convert by a reshape.
        hidden_states = hidden_states.reshape(batch, channels, rows, patch, columns, patch)
        hidden_states = hidden_states.permute(0, 2, 4, 1, 3, 5)  # [batch, rows, columns, channels, patch, patch]
        hidden_states = hidden_states.flatten(3).flatten(1, 2)  # [batch, tokens, channels * patch * patch]
        hidden_states = self.proj_in(hidden_states)  # [batch, tokens, dim]
        hidden_states = hidden_states + self._positions(rows, columns, hidden_states)  # [batch, tokens, dim]
        rotary = self.config.use_rotary_positional_embeddings
        image_rotary_emb = self._rotations(rows, columns, hidden_states) if rotary else None

        # 2. Embed timestep and conditions, by which the blocks are modulated.
        timestep = torch.as_tensor(timestep, device=hidden_states.device)
        timestep = timestep.expand(batch) if timestep.ndim == 0 or timestep.shape[0] == 1 else timestep  # [batch]
        frequencies = self.time_proj(timestep)  # [batch, 256], float32
        # The time embedding stays in float32 in a half precision model (`_keep_in_fp32_modules`).
        temb = self.time_embedding(frequencies.to(self.time_embedding.linear_1.weight.dtype))  # [batch, dim]
        if self.condition_embedding is not None:
            temb = temb + self._embed_conditions(condition_ids, batch)  # [batch, dim]
        elif condition_ids is not None and condition_ids.shape[-1]:
            raise ValueError("condition_ids were given, but this model has no conditions")
        temb = nn.functional.silu(temb).to(hidden_states.dtype)  # [batch, dim]

        # 3. Run the blocks.
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                # ModelMixin of diffusers 0.42.1 sets this function when gradient checkpointing is enabled.
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, temb, image_rotary_emb)
            else:
                hidden_states = block(hidden_states, temb, image_rotary_emb)  # [batch, tokens, dim]

        # 4. Project, and unpatchify: here the channels are last in a patch, as in facebookresearch/DiT.
        shift, scale = self.modulation_out(temb).unsqueeze(1).chunk(2, dim=-1)  # each [batch, 1, dim]
        hidden_states = self.norm_out(hidden_states) * (1 + scale) + shift  # [batch, tokens, dim]
        hidden_states = self.proj_out(hidden_states)  # [batch, tokens, patch * patch * out_channels]
        hidden_states = hidden_states.reshape(batch, rows, columns, patch, patch, self.out_channels)
        hidden_states = hidden_states.permute(0, 5, 1, 3, 2, 4)  # [batch, out_channels, rows, patch, columns, patch]
        sample = hidden_states.reshape(batch, self.out_channels, height, width)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def to_json_string(self) -> str:
        """Return the config as JSON with `conditions` in their order, which decides what `condition_ids` mean."""
        # diffusers sorts the keys at every depth.
        config = json.loads(super().to_json_string())
        config["conditions"] = dict(self.config.conditions) if self.config.conditions else None
        return json.dumps(config, indent=2) + "\n"

    def _embed_conditions(self, condition_ids: torch.Tensor | None, batch: int) -> torch.Tensor:
        """Return the sum of the embeddings of all conditions, [batch, dim]."""
        if condition_ids is None:
            condition_ids = self.null_condition_ids.expand(batch, -1)
        elif condition_ids.shape != (batch, len(self.null_condition_ids)):
            expected = (batch, len(self.null_condition_ids))
            raise ValueError(f"condition_ids has shape {tuple(condition_ids.shape)}; expected {expected}")
        embeddings = self.condition_embedding(condition_ids + self.condition_offsets)  # [batch, conditions, dim]
        return embeddings.sum(dim=1)

    def _positions(self, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
        """Return fixed 2-D sin-cos positions [rows * columns, dim]: columns in the first half, rows in the second."""
        axes = []
        for position in self._axes(rows, columns, like.device):
            frequency = torch.arange(self.inner_dim // 4, device=like.device, dtype=torch.float32)
            frequency = torch.exp(frequency * (-4 * math.log(10000) / self.inner_dim))  # [dim / 4]
            angle = position[:, None] * frequency  # [columns or rows, dim / 4]
            axes.append(torch.cat([angle.sin(), angle.cos()], dim=-1))  # [columns or rows, dim / 2]
        x = axes[0][None].expand(rows, -1, -1)  # [rows, columns, dim / 2]
        y = axes[1][:, None].expand(-1, columns, -1)  # [rows, columns, dim / 2]
        return torch.cat([x, y], dim=-1).flatten(0, 1).to(like.dtype)  # [rows * columns, dim]

    def _rotations(self, rows: int, columns: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine of each token's angles, [rows * columns, head_dim]; the two of a pair are equal.

        The highest frequency is one radian a token, the lowest nearly a hundredth of it: a theta of 100 instead of
        10,000, because a side has tens of tokens and not thousands.
        """
        x, y = self._axes(rows, columns, like.device)
        tokens = x.repeat(rows), y.repeat_interleave(columns, output_size=rows * columns)  # each [rows * columns]
        dim = self.config.attention_head_dim // 2
        (cos_x, sin_x), (cos_y, sin_y) = (get_1d_rotary_pos_embed(dim, p, theta=100.0, use_real=True) for p in tokens)
        return torch.cat([cos_x, cos_y], dim=-1).to(like.dtype), torch.cat([sin_x, sin_y], dim=-1).to(like.dtype)

    def _axes(self, rows: int, columns: int, device: torch.device) -> list[torch.Tensor]:
        """Return the positions of columns and rows in tokens of the base extent, float32 [columns] and [rows]."""
        extents = (columns, self.base_grid[1]), (rows, self.base_grid[0])
        return [torch.arange(n, device=device, dtype=torch.float32) * (base / n) for n, base in extents]


# diffusers' feature caches (FirstBlockCache, ...) look up here which output of a block is the tokens, and its guiders
# what stands in for an attention that is skipped.
AttentionProcessorRegistry.register(
    model_class=LatentDiTAttnProcessor,
    metadata=AttentionProcessorMetadata(
        skip_processor_output_fn=lambda _attn, hidden_states, **_options: hidden_states
    ),
)
TransformerBlockRegistry.register(
    model_class=LatentDiTTransformerBlock,
    metadata=TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
)
