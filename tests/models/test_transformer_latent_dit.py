import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_transformer
from diffusers.models.embeddings import apply_rotary_emb as diffusers_rotary_emb

from dit_hf import LatentDiTTransformer2DModel
from dit_hf.config import PRESETS
from dit_hf.models.transformer_latent_dit import LatentDiTLayerNorm, LatentDiTRMSNorm, apply_rotary_emb

CONDITIONS = {"Smiling": 2, "Eyeglasses": 2, "class": 5}


def inputs(batch=3, height=8, width=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(batch, 4, height, width, generator=generator)
    return hidden_states, torch.tensor([0.0, 3.25, 499.0])[:batch]


def dit_forward(model, hidden_states, timestep, condition_ids):
    """Compute DiT from the paper's formulas and the state dict alone."""
    w, config = dict(model.state_dict()), model.config
    heads, dim, p = config.num_attention_heads, model.inner_dim, config.patch_size

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    # 1. Tokens and their positions, by numpy and one by one.
    batch, _, height, width = hidden_states.shape
    rows, columns = height // p, width // p
    omega = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    position = np.zeros((rows, columns, dim))
    for i in range(rows):
        for j in range(columns):
            position[i, j] = np.concatenate(
                [np.sin(j * omega), np.cos(j * omega), np.sin(i * omega), np.cos(i * omega)]
            )
    patches = F.unfold(hidden_states, p, stride=p).transpose(1, 2)  # [batch, tokens, channels * p * p]
    x = linear(patches, "proj_in") + torch.from_numpy(position).float().reshape(1, rows * columns, dim)

    # 2. Timestep and conditions.
    frequency = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angle = timestep[:, None] * frequency
    c = linear(
        F.silu(linear(torch.cat([angle.cos(), angle.sin()], 1), "time_embedding.linear_1")), "time_embedding.linear_2"
    )
    offset = 0
    for i, values in enumerate(config.conditions.values()):
        c = c + w["condition_embedding.weight"][offset + condition_ids[:, i]]
        offset += values + 1
    c = F.silu(c)

    # 3. Blocks: attention, then feed-forward.
    for layer in range(config.num_layers):
        name = f"transformer_blocks.{layer}"
        s1, b1, g1, s2, b2, g2 = linear(c, f"{name}.modulation")[:, None].split(dim, -1)
        h = norm(x) * (1 + b1) + s1
        q, k, v = (
            linear(h, f"{name}.attn.{n}").reshape(batch, -1, heads, dim // heads).transpose(1, 2)
            for n in ("to_q", "to_k", "to_v")
        )
        if config.qk_norm:
            q, k = (
                x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.attn.{n}.weight"]
                for x, n in ((q, "norm_q"), (k, "norm_k"))
            )
        if config.use_rotary_positional_embeddings:
            q, k = (rotated(x, rows, columns) for x in (q, k))
        attention = ((q @ k.transpose(2, 3)) / math.sqrt(dim // heads)).softmax(-1) @ v
        x = x + g1 * linear(attention.transpose(1, 2).reshape(batch, -1, dim), f"{name}.attn.to_out.0")
        h = linear(norm(x) * (1 + b2) + s2, f"{name}.ff.net.0.proj")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + g2 * linear(h, f"{name}.ff.net.2")

    # 4. Output, patch by patch.
    shift, scale = linear(c, "modulation_out")[:, None].split(dim, -1)
    x = linear(norm(x) * (1 + scale) + shift, "proj_out")
    out = torch.zeros(batch, model.out_channels, height, width)
    for i in range(rows):
        for j in range(columns):
            patch = x[:, i * columns + j].reshape(batch, p, p, model.out_channels).permute(0, 3, 1, 2)
            out[:, :, i * p : i * p + p, j * p : j * p + p] = patch
    return out


def rotated(x, rows, columns):
    """Rotate heads by complex numbers, token by token: the first half by column, the second by row."""
    out, half = x.clone(), x.shape[-1] // 2
    omega = 100.0 ** (-np.arange(0, half, 2) / half)
    for i in range(rows):
        for j in range(columns):
            for place, begin in ((j, 0), (i, half)):
                pairs = x[:, :, i * columns + j, begin : begin + half].unflatten(-1, (-1, 2)).contiguous()
                rotation = torch.from_numpy(np.exp(1j * place * omega)).to(torch.complex64)
                values = torch.view_as_real(torch.view_as_complex(pairs) * rotation)
                out[:, :, i * columns + j, begin : begin + half] = values.flatten(-2)
    return out


@pytest.mark.parametrize("options", [{}, {"qk_norm": "rms_norm"}, {"use_rotary_positional_embeddings": True}])
def test_forward_is_that_of_the_paper(options):
    model = tiny_transformer(conditions=CONDITIONS, **options)
    hidden_states, timestep = inputs()
    ids = torch.tensor([[0, 1, 4], [1, 2, 5], [2, 0, 0]])
    with torch.no_grad():
        expected = dit_forward(model, hidden_states, timestep, ids)
        torch.testing.assert_close(model(hidden_states, timestep, ids).sample, expected, atol=1e-5, rtol=1e-4)


def test_new_model_predicts_zero_and_blocks_are_identities():
    model = LatentDiTTransformer2DModel(sample_size=8, **PRESETS["tiny"])
    hidden_states, timestep = inputs()
    assert model(hidden_states, timestep).sample.abs().max() == 0
    tokens = torch.randn(2, 5, model.inner_dim)
    assert torch.equal(model.transformer_blocks[0](tokens, torch.randn(2, model.inner_dim)), tokens)


def test_reference_preset_has_the_reference_systems_size():
    with torch.device("meta"):
        model = LatentDiTTransformer2DModel(sample_size=32, **PRESETS["reference"])
    assert (model.config.num_layers, model.config.num_attention_heads, model.inner_dim) == (10, 8, 768)


@pytest.mark.parametrize(("preset", "millions"), [("S/2", 33), ("B/2", 130), ("L/2", 458), ("XL/2", 675)])
def test_presets_have_the_papers_sizes(preset, millions):
    """Table 4 of the paper, whose models have 1,000 classes and a learned sigma."""
    with torch.device("meta"):
        model = LatentDiTTransformer2DModel(
            sample_size=32, out_channels=8, conditions={"class": 1000}, **PRESETS[preset]
        )
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize(("height", "width"), [(8, 12), (4, 8), (16, 16)])
def test_any_size_divisible_by_the_patch(height, width):
    hidden_states, timestep = inputs(height=height, width=width)
    out = tiny_transformer()(hidden_states, timestep, return_dict=False)[0]
    assert out.shape == hidden_states.shape
    assert out.isfinite().all()


def test_rotary_positions_depend_on_the_distance_of_two_tokens():
    model = tiny_transformer(use_rotary_positional_embeddings=True)
    cos, sin = model._rotations(4, 4, torch.zeros(1))
    query, key = torch.randn(2, model.config.attention_head_dim)
    vectors = torch.stack([query, key]).expand(16, 2, -1)[None]  # the same two at every token
    rotated = apply_rotary_emb(vectors, cos, sin)
    torch.testing.assert_close(rotated, diffusers_rotary_emb(vectors, (cos, sin), sequence_dim=1))
    query, key = rotated[0].unbind(1)
    products = (query @ key.T).reshape(4, 4, 4, 4)  # row and column of the query, row and column of the key
    torch.testing.assert_close(products[1:, 1:, 1:, 1:], products[:-1, :-1, :-1, :-1], atol=1e-4, rtol=1e-4)
    assert products[0, 0].unique().numel() == 16
    fine, coarse = model._rotations(8, 4, torch.zeros(1))[0], cos
    torch.testing.assert_close(fine.reshape(8, 4, -1)[::2], coarse.reshape(4, 4, -1))


def test_positions_stretch_over_the_trained_extent():
    model = tiny_transformer()
    small = model._positions(4, 4, torch.zeros(1)).reshape(4, 4, -1)
    large = model._positions(8, 4, torch.zeros(1)).reshape(8, 4, -1)
    torch.testing.assert_close(large[::2], small)


def test_null_conditions_are_the_default_and_have_an_effect():
    model = tiny_transformer(conditions=CONDITIONS)
    hidden_states, timestep = inputs()
    nulls = torch.tensor([[2, 2, 5]] * 3)
    assert torch.equal(model(hidden_states, timestep).sample, model(hidden_states, timestep, nulls).sample)
    for column in range(3):
        given = nulls.clone()
        given[:, column] = 0
        assert not torch.allclose(model(hidden_states, timestep).sample, model(hidden_states, timestep, given).sample)


def test_one_timestep_for_all_and_fractions():
    model = tiny_transformer()
    hidden_states, _ = inputs()
    each = model(hidden_states, torch.full((3,), 7.5)).sample
    assert torch.equal(model(hidden_states, 7.5).sample, each)
    assert torch.equal(model(hidden_states, torch.tensor(7.5)).sample, each)
    assert not torch.equal(model(hidden_states, torch.tensor(7.0)).sample, each)


def test_learned_sigma_doubles_the_channels():
    assert tiny_transformer(out_channels=8)(*inputs()).sample.shape == (3, 8, 8, 8)


def test_timestep_shift_changes_the_features():
    assert not torch.allclose(
        tiny_transformer(timestep_freq_shift=1.0)(*inputs()).sample, tiny_transformer()(*inputs()).sample
    )


def test_saves_and_loads_bit_for_bit_with_conditions_in_order(tmp_path):
    model = tiny_transformer(conditions=CONDITIONS)
    model.save_pretrained(tmp_path)
    loaded = LatentDiTTransformer2DModel.from_pretrained(tmp_path)
    assert list(loaded.config.conditions) == list(CONDITIONS)
    ids = torch.tensor([[0, 1, 4], [1, 2, 5], [2, 0, 0]])
    assert torch.equal(loaded(*inputs(), ids).sample, model(*inputs(), ids).sample)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_compiles_as_one_graph(rotary, half):
    norm = "rms_norm" if rotary else None
    model = tiny_transformer(conditions=CONDITIONS, use_rotary_positional_embeddings=rotary, qk_norm=norm)
    ids = torch.tensor([[0, 1, 4], [1, 2, 5], [2, 0, 0]])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        torch.testing.assert_close(compiled(*inputs(), ids).sample, model(*inputs(), ids).sample)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_transformer(use_rotary_positional_embeddings=True).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(*inputs()).sample.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_fused_projections_give_the_same():
    model = tiny_transformer()
    before = model(*inputs()).sample
    with torch.no_grad():
        model.fuse_qkv_projections()
    assert model.transformer_blocks[0].attn.fused_projections
    torch.testing.assert_close(model(*inputs()).sample, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_transformer(sample_size=7), "not divisible by patch_size"),
        (lambda: tiny_transformer(num_layers=10**9), "expected num_layers from 1 to 1,000, got 1000000000"),
        (lambda: tiny_transformer(num_layers=-1), "expected num_layers from 1 to 1,000, got -1"),
        (lambda: tiny_transformer(num_attention_heads=-2), "expected num_attention_heads from 1 to 1,000, got -2"),
        (lambda: tiny_transformer(sample_size=(8, 10**9)), "expected sample_size from 1 to 10,000"),
        (lambda: tiny_transformer(patch_size=0), "expected patch_size from 1 to 10,000, got 0"),
        (lambda: tiny_transformer(attention_head_dim=3), "not divisible by 4"),
        (lambda: tiny_transformer(sample_size="8"), "expected sample_size from 1 to 10,000, got '8'"),
        (lambda: tiny_transformer(position_base_size=0), "expected position_base_size from 1 to 10,000, got 0"),
        (lambda: tiny_transformer(in_channels=0), "expected in_channels from 1 to 10,000, got 0"),
        (lambda: tiny_transformer(num_layers=True), "expected num_layers from 1 to 1,000, got True"),
        (lambda: tiny_transformer(mlp_ratio=float("nan")), "expected mlp_ratio from 0.01 to 100, got nan"),
        (lambda: tiny_transformer(timestep_freq_shift=128), "expected timestep_freq_shift from 0 to 100, got 128"),
        (lambda: tiny_transformer(use_rotary_positional_embeddings="yes"), "to be true or false, got 'yes'"),
        (lambda: tiny_transformer(conditions=[["a", 2]]), "expected conditions to be a dict"),
        (lambda: tiny_transformer(conditions={"a": -1}), "the values of condition 'a' from 1 to 10,000,000, got -1"),
        (lambda: tiny_transformer(conditions={"a": "2"}), "the values of condition 'a' from 1 to 10,000,000, got '2'"),
        (lambda: tiny_transformer(conditions={"a": 10**7, "b": 2}), "all values of all conditions from 1"),
        (lambda: tiny_transformer(conditions={"a\x1b[2J": 2}), r"condition, 'a\\x1b\[2J', holds characters"),
        (lambda: tiny_transformer(conditions={"\ud800": 2}), "holds characters that cannot be printed"),
        (
            lambda: tiny_transformer(
                num_attention_heads=2, attention_head_dim=6, use_rotary_positional_embeddings=True
            ),
            "rotary positions need",
        ),
        (lambda: tiny_transformer()(torch.zeros(1, 4, 7, 8), torch.tensor(0)), "7x8"),
        (lambda: tiny_transformer(conditions={"a": 2})(*inputs(), torch.zeros(3, 2).long()), r"expected \(3, 1\)"),
        (lambda: tiny_transformer()(*inputs(), torch.zeros(3, 1).long()), "no conditions"),
    ],
)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [LatentDiTLayerNorm, LatentDiTRMSNorm])
def test_norms_return_the_precision_of_their_input(kind, dtype):
    """Under autocast too, which on a GPU would return float32."""
    norm = kind(64).cuda()
    x = 3 * torch.randn(5, 64, device="cuda").to(dtype) + 1
    with torch.autocast("cuda", dtype):
        half = norm(x)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), norm(x.float()), rtol=2 * torch.finfo(dtype).eps, atol=0.01)
