"""The EMA of the weights, against its formula."""

import pytest
import torch
from torch import nn

from dit_hf.config import OptimConfig
from dit_hf.training.ema import EMA
from dit_hf.training.optimizer import build_optimizer

NO_OVERFLOW = torch.zeros(())


def ema_of(model, ema):
    with ema.swapped_in():
        return model.weight.detach().clone()


def test_ema_follows_the_formula():
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.95)
    expected = model.weight.detach().clone()
    for step in range(300):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3))
        ema.update(step, NO_OVERFLOW)
        decay = min(0.95, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        torch.testing.assert_close(ema_of(model, ema), expected)


def test_ema_does_not_change_where_the_loss_scaler_skips_a_step():
    """With the real scaler of fp16: a step whose gradients overflow changes neither the weights nor the EMA."""
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.9)
    optimizer, _ = build_optimizer(model, OptimConfig(learning_rate=0.1), torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for overflow in (True, False):
        weights, ema_before = model.weight.clone(), ema_of(model, ema)
        loss = model(torch.ones(1, 3)).sum() * (1e38 if overflow else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        (found_inf,) = scaler._found_inf_per_device(optimizer).values()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        ema.update(50, found_inf)
        assert torch.equal(model.weight, weights) is overflow
        assert torch.equal(ema_of(model, ema), ema_before) is overflow


def test_without_decay_the_ema_is_the_model():
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.0)
    with torch.no_grad():
        model.weight.add_(1)
    ema.update(0, NO_OVERFLOW)
    torch.testing.assert_close(ema_of(model, ema), model.weight)


def test_swapping_the_ema_in_and_out_changes_no_bit():
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.9)
    with torch.no_grad():
        model.weight.normal_()
    ema.update(5, NO_OVERFLOW)
    weight, ema_before = model.weight.clone(), ema_of(model, ema)
    assert not torch.equal(weight, ema_before)
    with pytest.raises(RuntimeError, match="in the block"), ema.swapped_in():
        raise RuntimeError("in the block")
    assert torch.equal(model.weight, weight)
    assert torch.equal(ema_of(model, ema), ema_before)
