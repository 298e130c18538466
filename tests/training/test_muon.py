import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from training_runs import assert_same_bits, changed

from dit_hf import LatentDiTTransformer2DModel
from dit_hf.config import OptimConfig
from dit_hf.training.muon import COEFFICIENTS, orthogonalize
from dit_hf.training.optimizer import build_optimizer
from dit_hf.training.trainer import train

CONFIG = OptimConfig(optimizer="muon", learning_rate=1e-2, adam_beta2=0.9, adam_weight_decay=0.1)


def transformer():
    torch.manual_seed(0)
    model = LatentDiTTransformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=16, conditions={"Male": 2}
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def give_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def build(model, config=CONFIG, precision="bf16"):
    return build_optimizer(model, config, torch.device("cpu"), precision)[0]


def heads_of(name, matrix):
    """The slices of a matrix that belong to one of the two heads each; the whole matrix where it has none."""
    if ".attn." not in name:
        return (matrix,)
    return matrix.chunk(2, dim=1 if ".to_out." in name else 0)


def test_steps_are_those_of_torchs_muon_on_each_head_and_of_torchs_adamw():
    ours, theirs = transformer(), transformer()
    initial = [p.detach().clone() for p in ours.parameters()]
    optimizer = build(ours, precision="no")
    inner = {n: p for n, p in theirs.named_parameters() if p.ndim == 2 and (".attn." in n or ".ff." in n)}
    assert len(inner) == 2 * 6
    heads = {name: [nn.Parameter(part.detach().clone()) for part in heads_of(name, p)] for name, p in inner.items()}
    adam = {"betas": (0.9, 0.9), "eps": 1e-8, "lr": 1e-2}
    rest = [(n, p) for n, p in theirs.named_parameters() if n not in inner]
    decayed = [p for n, p in rest if p.ndim > 1 and n != "condition_embedding.weight"]
    others = [p for n, p in rest if not any(p is q for q in decayed)]
    reference = [
        torch.optim.Muon(
            [part for parts in heads.values() for part in parts],
            lr=1e-2,
            weight_decay=0.1,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(decayed, weight_decay=0.1, **adam),
        torch.optim.AdamW(others, weight_decay=0.0, **adam),
    ]
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for name, matrix in inner.items():
            for part, gradient in zip(heads[name], heads_of(name, matrix.grad), strict=True):
                part.grad = gradient
        for one in (optimizer, *reference):
            one.step()
    for name, matrix in inner.items():
        for part, final in zip(heads_of(name, matrix.data), heads[name], strict=True):
            part.copy_(final.detach())
    for (name, one), other, start in zip(ours.named_parameters(), theirs.parameters(), initial, strict=True):
        difference = ((one - other).norm() / (other - start).norm()).item()
        # torch's rounds to bfloat16 on the way.
        assert difference < (0.02 if name in inner else 1e-5), name


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 16), (2, 16, 64)])
def test_singular_values_are_made_equal_and_directions_kept(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    u, values, vt = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalize(matrices, torch.float64).double()
    new = u.mT @ result @ vt.mT
    off_diagonal = new - torch.diag_embed(new.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-5
    # Five iterations leave what was near 0 behind; this is what they make of the others.
    large = values > 0.05 * values.norm(dim=-1, keepdim=True)
    assert new.diagonal(dim1=-2, dim2=-1)[large].min() > 0.6
    assert new.diagonal(dim1=-2, dim2=-1).max() < 1.3


@pytest.mark.parametrize("shape", [(2, 96, 96), (2, 64, 256), (2, 256, 64)], ids=["square", "wide", "tall"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.float16, 0.015), (torch.bfloat16, 0.12)])
def test_few_large_directions_do_not_drown_the_others_in_rounding(shape, dtype, error):
    """Gradients are like that; a Gram matrix that is iterated on for too long loses what is small in them."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(shape[0], shape[1], 2, generator=generator) @ torch.randn(
        shape[0], 2, shape[2], generator=generator
    )
    matrices = torch.randn(shape, generator=generator) + 10 * few
    a, b, c = COEFFICIENTS
    expected = matrices.double() / matrices.double().norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):  # as it is published
        gram = expected @ expected.mT
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    result = orthogonalize(matrices, dtype)
    assert result.dtype == dtype
    assert (result.double() - expected).norm() < error * expected.norm()


def test_an_overflowing_gradient_changes_nothing():
    """With the real scaler of fp16, beside a run that never saw the overflow."""
    disturbed, calm = transformer(), transformer()
    for model, steps in ((disturbed, (0, None, 1)), (calm, (0, 1))):
        optimizer, scaler = build(model, precision="no"), torch.amp.GradScaler("cpu", init_scale=1.0)
        for step in steps:
            give_gradients(model, step or 0)
            if step is None:
                model.proj_out.weight.grad[0, 0] = torch.inf  # Adam's: Muon must skip the step, too
            scaler.scale(torch.ones(()))
            scaler.unscale_(optimizer)
            before = [p.detach().clone() for p in model.parameters()]
            scaler.step(optimizer)
            scaler.update(1.0)
            moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
            assert not any(moved) if step is None else all(moved)
    for one, other in zip(disturbed.parameters(), calm.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_loaded_state_still_has_adam_fused():
    """Otherwise torch would load its step count on the CPU, where the fused kernels of a GPU cannot read it."""
    model = transformer()
    optimizer = build(model)
    give_gradients(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    again = build(model)
    set_optimizer_state_dict(model, again, state, options=StateDictOptions(full_state_dict=True))
    assert all(group["fused"] for group in again.param_groups)
    assert again.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_stopped_run_resumes_on_a_gpu(config):
    config = changed(config, optim={"optimizer": "muon"}, train={"resume_from_checkpoint": "latest"})
    train(changed(config, train={"max_train_steps": config.train.max_train_steps // 2}))
    assert (train(config) / f"checkpoint-{config.train.max_train_steps}").is_dir()


def test_a_stopped_run_resumes_with_the_same_bits(config, tmp_path):
    config = changed(config, optim={"optimizer": "muon"})
    whole = train(config)
    parts = changed(config, train={"output_dir": str(tmp_path / "parts"), "resume_from_checkpoint": "latest"})
    half = config.train.max_train_steps // 2
    train(changed(parts, train={"max_train_steps": half}))
    run = train(parts)
    last = f"checkpoint-{config.train.max_train_steps}"
    assert_same_bits(whole / last, run / last)
