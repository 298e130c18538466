import sys
import types

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from dit_hf.training.config import OptimConfig
from dit_hf.training.optimizer import EMA, build_optimizer, learning_rate

NO_OVERFLOW = torch.zeros(())


def average_of(model, ema):
    with ema.swapped_in():
        return model.weight.detach().clone()


def test_average_is_the_formula():
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.95)
    expected = model.weight.detach().clone()
    for step in range(300):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3))
        ema.update(step, NO_OVERFLOW)
        decay = min(0.95, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        torch.testing.assert_close(average_of(model, ema), expected)


def test_average_stands_still_where_the_loss_scaler_skips_a_step():
    """With the real scaler of fp16: a step whose gradients overflow changes neither the weights nor the average."""
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.9)
    optimizer, _ = build_optimizer(model, OptimConfig(learning_rate=0.1), torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for overflow in (True, False):
        weights, average = model.weight.clone(), average_of(model, ema)
        loss = model(torch.ones(1, 3)).sum() * (1e38 if overflow else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        (found_inf,) = scaler._found_inf_per_device(optimizer).values()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        ema.update(50, found_inf)
        assert torch.equal(model.weight, weights) is overflow
        assert torch.equal(average_of(model, ema), average) is overflow


def test_without_decay_the_average_is_the_model():
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.0)
    with torch.no_grad():
        model.weight.add_(1)
    ema.update(0, NO_OVERFLOW)
    torch.testing.assert_close(average_of(model, ema), model.weight)


def test_swapping_the_average_in_and_out_changes_no_bit():
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.9)
    with torch.no_grad():
        model.weight.normal_()
    ema.update(5, NO_OVERFLOW)
    weight, average = model.weight.clone(), average_of(model, ema)
    assert not torch.equal(weight, average)
    with pytest.raises(RuntimeError, match="in the block"), ema.swapped_in():
        raise RuntimeError("in the block")
    assert torch.equal(model.weight, weight)
    assert torch.equal(average_of(model, ema), average)


def test_apex_adam_takes_up_a_saved_state(monkeypatch):
    """With apex's signatures, which are not torch's: loading a state calls `zero_grad(set_to_none=True)`."""

    class FusedAdam(torch.optim.AdamW):
        def __init__(self, params, adam_w_mode, **options):
            super().__init__(params, **options)

        def zero_grad(self):
            super().zero_grad()

    module = types.ModuleType("apex.optimizers")
    module.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)

    def build(**options):
        model = nn.Linear(3, 2)
        return model, *build_optimizer(model, OptimConfig(), torch.device("cuda"), "fp16", **options)

    model, optimizer, name = build()
    assert name == "apex FusedAdam"
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    state = get_optimizer_state_dict(model, optimizer)
    model, optimizer, _ = build()
    set_optimizer_state_dict(model, optimizer, state)
    assert [entry["step"].item() for entry in optimizer.state.values()] == [3, 3]
    assert build(sharded=True)[2] == "torch AdamW (fused)"  # apex's kernels find no memory behind a DTensor


def test_biases_gains_and_embeddings_are_not_decayed():
    model = nn.Sequential(nn.Embedding(4, 3), nn.RMSNorm(3), nn.Linear(3, 2))
    optimizer, _ = build_optimizer(model, OptimConfig(learning_rate=0.1, adam_weight_decay=0.5), torch.device("cpu"))
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    embedding, gain, weight, bias = (torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert embedding
    assert gain
    assert bias
    assert not weight


def test_learning_rate_warms_up_and_decays():
    config = OptimConfig(learning_rate=1.0, lr_warmup_steps=10, lr_scheduler="linear", lr_decay_ratio=0.4)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1
    assert rates[60] == 1
    assert rates[80] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.025)
    cosine = OptimConfig(learning_rate=1.0, lr_scheduler="cosine")
    assert learning_rate(cosine, 50, 100) == pytest.approx(0.5)
    assert learning_rate(OptimConfig(learning_rate=2e-5), 99, 100) == 2e-5


def test_optimizer_is_adam_with_decoupled_weight_decay():
    """Against Adam written from the paper (Kingma & Ba, algorithm 1) and Loshchilov & Hutter's decay."""
    config = OptimConfig(learning_rate=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6, adam_weight_decay=0.01)
    model = nn.Linear(2, 1, bias=False)
    parameter = model.weight
    with torch.no_grad():
        parameter.copy_(torch.tensor([[1.0, -2.0]]))
    optimizer, name = build_optimizer(model, config, torch.device("cpu"))
    assert name == "torch AdamW (fused)"
    expected, m, v = parameter.detach().clone(), torch.zeros(1, 2), torch.zeros(1, 2)
    for step in range(1, 6):
        gradient = torch.tensor([[0.3, -0.1]]) * step
        parameter.grad = gradient.clone()
        optimizer.step()
        expected = expected * (1 - 0.1 * 0.01)
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        expected = expected - 0.1 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-6)
        torch.testing.assert_close(parameter.detach(), expected)
