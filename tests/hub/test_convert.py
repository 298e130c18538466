"""`dit-hf convert` against small forward passes of both other DiTs, written here from their papers and docs."""

import argparse
import json
import math
import os

import numpy as np
import pytest
import torch
from conftest import tiny_vae
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import save_file
from torch.nn import functional

from dit_hf_cli import main

WIDTH, LAYERS, HEADS, PATCH, SIZE, CLASSES = 24, 2, 2, 2, 8, 5


def research_weights(out_channels=8, seed=0):
    """Random weights under facebookresearch/DiT's names."""
    random = torch.Generator().manual_seed(seed)
    shapes = {
        "x_embedder.proj": (WIDTH, 4, PATCH, PATCH),
        "t_embedder.mlp.0": (WIDTH, 256),
        "t_embedder.mlp.2": (WIDTH, WIDTH),
        "final_layer.linear": (PATCH**2 * out_channels, WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    }
    for i in range(LAYERS):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * WIDTH, WIDTH),
            f"blocks.{i}.attn.proj": (WIDTH, WIDTH),
            f"blocks.{i}.mlp.fc1": (4 * WIDTH, WIDTH),
            f"blocks.{i}.mlp.fc2": (WIDTH, 4 * WIDTH),
            f"blocks.{i}.adaLN_modulation.1": (6 * WIDTH, WIDTH),
        }
    weights = {"y_embedder.embedding_table.weight": torch.randn(CLASSES + 1, WIDTH, generator=random)}
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = 0.2 * torch.randn(shape, generator=random)
        weights[f"{name}.bias"] = 0.2 * torch.randn(shape[0], generator=random)
    weights["pos_embed"] = positions()[None]
    return weights


def positions():
    """Sines and cosines of the column, then of the row, of each patch."""
    frequency = 1 / 10000 ** (np.arange(WIDTH // 4) / (WIDTH / 4))
    rows = []
    for row in range(SIZE // PATCH):
        for column in range(SIZE // PATCH):
            angles = [column * frequency, row * frequency]
            rows.append(np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)]))
    return torch.tensor(np.stack(rows), dtype=torch.float32)


def research_forward(w, x, t, y):
    """facebookresearch/DiT's network, one image at a time."""

    def linear(name, value):
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(value, shift, scale):
        mean, variance = value.mean(-1, keepdim=True), value.var(-1, unbiased=False, keepdim=True)
        return (value - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift

    grid, out = SIZE // PATCH, []
    for image, time, label in zip(x, t, y, strict=True):
        patches = [
            image[:, PATCH * r : PATCH * (r + 1), PATCH * c : PATCH * (c + 1)].flatten()
            for r in range(grid)
            for c in range(grid)
        ]
        kernel = w["x_embedder.proj.weight"].flatten(1)
        h = torch.stack(patches) @ kernel.T + w["x_embedder.proj.bias"] + w["pos_embed"][0]
        angles = time * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        features = torch.cat([angles.cos(), angles.sin()])
        condition = linear("t_embedder.mlp.2", functional.silu(linear("t_embedder.mlp.0", features)))
        condition = functional.silu(condition + w["y_embedder.embedding_table.weight"][label])
        for i in range(LAYERS):
            block = f"blocks.{i}"
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = linear(
                f"{block}.adaLN_modulation.1", condition
            ).chunk(6)
            q, k, v = linear(f"{block}.attn.qkv", norm(h, shift_msa, scale_msa)).chunk(3, dim=-1)
            heads = []
            for q_, k_, v_ in zip(q.chunk(HEADS, -1), k.chunk(HEADS, -1), v.chunk(HEADS, -1), strict=True):
                heads.append((q_ @ k_.T / math.sqrt(WIDTH / HEADS)).softmax(-1) @ v_)
            h = h + gate_msa * linear(f"{block}.attn.proj", torch.cat(heads, -1))
            inner = functional.gelu(linear(f"{block}.mlp.fc1", norm(h, shift_mlp, scale_mlp)), approximate="tanh")
            h = h + gate_mlp * linear(f"{block}.mlp.fc2", inner)
        shift, scale = linear("final_layer.adaLN_modulation.1", condition).chunk(2)
        h = linear("final_layer.linear", norm(h, shift, scale))
        image = torch.empty(h.shape[-1] // PATCH**2, SIZE, SIZE)
        for number, token in enumerate(h):
            r, c = divmod(number, grid)
            tile = token.reshape(PATCH, PATCH, -1).permute(2, 0, 1)
            image[:, PATCH * r : PATCH * (r + 1), PATCH * c : PATCH * (c + 1)] = tile
        out.append(image)
    return torch.stack(out)


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(7)
    return torch.randn(3, 4, SIZE, SIZE, generator=random), torch.tensor([999, 250, 0]), torch.tensor([0, 4, CLASSES])


def convert(source, folder, vae_folder, *options):
    code = main(["convert", str(source), "--output_dir", str(folder), "--vae", str(vae_folder), *options])
    assert code == 0
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("kind", ["pretrained.pt", "trained.pt", "weights.safetensors"])
@pytest.mark.parametrize("out_channels", [4, 8])
def test_a_checkpoint_of_facebookresearch_gives_the_same_outputs(tmp_path, vae_folder, batch, kind, out_channels):
    weights = research_weights(out_channels)
    file = tmp_path / kind
    if kind == "trained.pt":
        other = {"model": research_weights(out_channels, seed=1), "args": argparse.Namespace(model="DiT-XL/2")}
        torch.save({**other, "ema": weights, "opt": {"state": {}}}, file)
    elif kind == "pretrained.pt":
        torch.save(weights, file)
    else:
        save_file(weights, file)
    pipeline = convert(file, tmp_path / "pipeline", vae_folder, "--num_attention_heads", str(HEADS))
    x, t, y = batch
    with torch.no_grad():
        out = pipeline.transformer(x, t, y[:, None]).sample
    torch.testing.assert_close(out, research_forward(weights, x, t, y), atol=1e-4, rtol=0)
    # The linear schedule of DDPM: 1e-4 to 0.02 in 1000 steps, predicting the noise.
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(pipeline.scheduler.alphas_cumprod.numpy(), expected, rtol=1e-4)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert pipeline({"class": 4}, num_inference_steps=2, output_type="latent").images.shape == (1, 4, SIZE, SIZE)


def random_diffusers(seed=0, classes=CLASSES):
    torch.manual_seed(seed)
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS, "num_layers": LAYERS}
    transformer = DiTTransformer2DModel(
        **sizes, in_channels=4, out_channels=8, sample_size=SIZE, num_embeds_ada_norm=classes
    ).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        first = transformer.transformer_blocks[0].norm1.emb
        for block in transformer.transformer_blocks:  # each has one of its own; in facebook/DiT-* they are the same
            block.norm1.emb.load_state_dict(first.state_dict())
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    return DiTPipeline(transformer=transformer, vae=tiny_vae(), scheduler=scheduler)


def diffusers_forward(transformer, x, t, y):
    """Run diffusers' network through `research_forward`: other names, and other frequencies of the timesteps."""
    theirs, w = transformer.state_dict(), {}
    names = {"x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out_2"}
    names |= {"final_layer.adaLN_modulation.1": "proj_out_1"}
    for i in range(LAYERS):
        block = f"transformer_blocks.{i}"
        names |= {
            f"blocks.{i}.attn.proj": f"{block}.attn1.to_out.0",
            f"blocks.{i}.mlp.fc1": f"{block}.ff.net.0.proj",
            f"blocks.{i}.mlp.fc2": f"{block}.ff.net.2",
            f"blocks.{i}.adaLN_modulation.1": f"{block}.norm1.linear",
        }
    for kind in ("weight", "bias"):
        w |= {f"{name}.{kind}": theirs[f"{other}.{kind}"] for name, other in names.items()}
        for i in range(LAYERS):
            parts = [theirs[f"transformer_blocks.{i}.attn1.to_{name}.{kind}"] for name in "qkv"]
            w[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    embedder = "transformer_blocks.0.norm1.emb"
    table = theirs[f"{embedder}.class_embedder.embedding_table.weight"]
    embedded = []
    for time, label in zip(t, y, strict=True):
        angles = time * torch.exp(-math.log(10000) * torch.arange(128) / 127)
        hidden = torch.cat([angles.cos(), angles.sin()])
        for layer in (1, 2):
            weight, bias = (theirs[f"{embedder}.timestep_embedder.linear_{layer}.{k}"] for k in ("weight", "bias"))
            hidden = weight @ (functional.silu(hidden) if layer == 2 else hidden) + bias
        embedded.append(hidden + table[label])
    # Pass the embedding in through the table: one label an image, and a zero embedding of the timestep.
    w["y_embedder.embedding_table.weight"] = torch.stack(embedded)
    w |= {"t_embedder.mlp.0.weight": torch.zeros(WIDTH, 256), "t_embedder.mlp.0.bias": torch.zeros(WIDTH)}
    w |= {"t_embedder.mlp.2.weight": torch.zeros(WIDTH, WIDTH), "t_embedder.mlp.2.bias": torch.zeros(WIDTH)}
    w["pos_embed"] = positions()[None]
    return research_forward(w, x, t, range(len(x)))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pipeline_of_diffusers_gives_the_same_outputs_and_keeps_its_labels(tmp_path, batch, legacy):
    other = random_diffusers()
    other.register_to_config(id2label={str(i): f"kind {i}, or so" for i in range(CLASSES)})
    other.save_pretrained(tmp_path / "theirs")
    if legacy:  # as facebook/DiT-XL-2-256 is filed
        for file in ("model_index.json", "transformer/config.json"):
            path = tmp_path / "theirs" / file
            path.write_text(path.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    pipeline = convert(tmp_path / "theirs", tmp_path / "ours", "unused")
    x, t, y = batch
    with torch.no_grad():
        out = pipeline.transformer(x, t, y[:, None]).sample
    torch.testing.assert_close(out, diffusers_forward(other.transformer, x, t, y), atol=1e-4, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(out, other.transformer(x, t, y).sample, atol=1e-4, rtol=0)
    assert pipeline.encode_attributes({"class": "kind 3, or so"}).tolist() == [[3]]
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod, other.scheduler.alphas_cumprod, rtol=1e-4, atol=0)


def test_other_files_are_refused_in_one_line(tmp_path, vae_folder, capsys):
    other = random_diffusers(seed=1)
    other.transformer.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias.data += 1
    other.save_pretrained(tmp_path / "diverged")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save(research_weights(), tmp_path / "odd.pt")
    torch.save({**research_weights(), "pos_embed": torch.zeros(1, 16, WIDTH)}, tmp_path / "positions.pt")
    torch.save({"ema": os.system}, tmp_path / "code.pt")  # not a plain value
    (tmp_path / "text.pt").write_text("no weights")
    torch.save(research_weights(), tmp_path / "SiT-XL-2-256x256.pt")
    sit = {"ema": research_weights(), "args": argparse.Namespace(model="SiT-XL/2", path_type="Linear")}
    torch.save(sit, tmp_path / "0400000.pt")
    for source, options, message in (
        ("diverged", [], "timestep_embedder.linear_1 differs from block to block"),
        ("other.pt", [], "not a checkpoint of facebookresearch/DiT: it has no pos_embed"),
        ("odd.pt", [], "has width 24; give --num_attention_heads"),
        ("positions.pt", ["--num_attention_heads", "2"], "has other positions"),
        ("code.pt", [], "no weights can be read"),
        ("text.pt", [], "no weights can be read"),
        ("SiT-XL-2-256x256.pt", [], "SiT predicts the velocity of a linear path"),
        ("0400000.pt", [], "SiT predicts the velocity of a linear path"),
        ("nowhere", [], "nowhere: no such file or folder; a pipeline on the Hub is OWNER/NAME"),
        (str(vae_folder), [], "a folder without model_index.json"),
    ):
        arguments = ["--output_dir", str(tmp_path / "out"), "--vae", str(vae_folder), *options]
        assert main(["convert", str(tmp_path / source), *arguments]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("dit-hf convert: error: ")
        assert message in error
        assert not (tmp_path / "out").exists()


def changed(**changes):
    """Return weights with some replaced (None: left out); `__` in a name is a dot."""
    weights = {**research_weights(), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (changed(extra__weight=torch.zeros(3)), [], "1 weights have no place in this model, e.g. extra.weight"),
        (
            changed(final_layer__linear__bias=torch.full((32,), math.nan)),
            [],
            "final_layer.linear.bias has values",
        ),
        (changed(pos_embed=torch.zeros(1, 17, WIDTH)), [], "pos_embed has the shape [1, 17, 24]; expected a square"),
        (changed(pos_embed=torch.zeros(16, WIDTH)), [], "pos_embed has the shape [16, 24]; expected 3 dimensions"),
        (changed(blocks__1__attn__qkv__bias=None), [], "it has no blocks.1.attn.qkv.bias"),
        (changed(blocks__1__mlp__fc1__bias=None), [], "blocks.1.mlp.fc1.bias is missing"),
        (changed(), ["--num_classes", "9"], "has 6 rows; expected --num_classes 5 or 6, got 9"),
        ({"model": None, "ema": None}, [], "not a checkpoint of facebookresearch/DiT"),
        ({"ema": torch.zeros(3)}, [], "ema is not a dict of weights"),
        ({1: torch.zeros(3)}, [], "not a checkpoint of facebookresearch/DiT"),
        (changed(final_layer__linear__weight=None), [], "it has no final_layer.linear.weight"),
        ({k.replace("blocks.1.", "blocks.7."): w for k, w in changed().items()}, [], "it has no blocks.1.attn.qkv"),
        (changed(x_embedder__proj__weight=torch.zeros(24, 4, 0, 2)), [], "proj.weight has the shape [24, 4, 0, 2]"),
        (changed(final_layer__linear__weight=torch.eye(32, 24).to_sparse()), [], "expected plain weights"),
        (changed(final_layer__linear__weight=torch.zeros(1).expand(800_000, 800_000)), [], "expected plain weights"),
        (changed(), ["--num_attention_heads=-2"], "expected num_attention_heads from 1 to 1,000, got -2"),
    ],
)
def test_a_weight_that_is_not_used_or_not_fit_is_refused(tmp_path, vae_folder, capsys, content, options, message):
    torch.save(content, tmp_path / "weights.pt")
    arguments = ["--output_dir", str(tmp_path / "out"), "--vae", str(vae_folder), "--num_attention_heads", "2"]
    assert main(["convert", str(tmp_path / "weights.pt"), *arguments, *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dit-hf convert: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_without_an_ema_the_weights_of_the_model_are_taken(tmp_path, vae_folder, batch):
    torch.save({"model": research_weights(), "ema": None}, tmp_path / "weights.pt")
    pipeline = convert(tmp_path / "weights.pt", tmp_path / "out", vae_folder, "--num_attention_heads", str(HEADS))
    x, t, y = batch
    with torch.no_grad():
        out = pipeline.transformer(x, t, y[:, None]).sample
    torch.testing.assert_close(out, research_forward(research_weights(), x, t, y), atol=1e-4, rtol=0)


def test_what_the_weights_do_not_tell_is_printed_and_an_option(tmp_path, vae_folder, capsys):
    """A table of one row more than classes, or as many: trained with label dropout or without."""
    torch.save(research_weights(), tmp_path / "weights.pt")
    options = ["--num_attention_heads", str(HEADS)]
    pipeline = convert(tmp_path / "weights.pt", tmp_path / "dropout", vae_folder, *options)
    assert pipeline.transformer.config.conditions == {"class": CLASSES}
    assert pipeline.config.guidance_scale == 4.0
    printed = capsys.readouterr().out
    assert f"row {CLASSES} of y_embedder.embedding_table.weight is taken for the unconditional one" in printed
    assert f"give --num_classes {CLASSES + 1}" in printed
    assert "--prediction_type epsilon and --beta_schedule linear" in printed
    options += ["--num_classes", str(CLASSES + 1), "--prediction_type", "v_prediction"]
    options += ["--beta_schedule", "squaredcos_cap_v2"]
    pipeline = convert(tmp_path / "weights.pt", tmp_path / "no_dropout", vae_folder, *options)
    assert pipeline.transformer.config.conditions == {"class": CLASSES + 1}
    assert pipeline.config.guidance_scale == 1.0
    table = research_weights()["y_embedder.embedding_table.weight"]
    assert torch.equal(pipeline.transformer.condition_embedding.weight[:-1], table)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    stock = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod, stock.alphas_cumprod, rtol=1e-4, atol=1e-7)


def test_conversion_and_export_give_the_original_weights(tmp_path):
    other = random_diffusers(classes=1000)
    other.save_pretrained(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), "--output_dir", str(tmp_path / "ours")]) == 0
    assert main(["push", str(tmp_path / "ours"), "--builtin", "--output_dir", str(tmp_path / "back")]) == 0
    back = DiffusionPipeline.from_pretrained(tmp_path / "back")
    assert type(back) is DiTPipeline
    before, after = other.transformer.state_dict(), back.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert isinstance(back.vae, AutoencoderKL)
    assert json.loads((tmp_path / "back" / "model_index.json").read_text())["_class_name"] == "DiTPipeline"
