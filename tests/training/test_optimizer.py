import itertools
import sys
import types

import pytest
import torch
from torch import nn

from dit_hf.config import OptimConfig
from dit_hf.training.checkpoint import TrainingTensors, save_checkpoint
from dit_hf.training.optimizer import build_optimizer, learning_rate


class FusedAdam(torch.optim.Optimizer):
    """Adam as NVIDIA's apex lays it out: steps counted by group, its own signatures; the arithmetic is torch's."""

    def __init__(self, params, lr, betas, eps, weight_decay=0.0, bias_correction=True, adam_w_mode=True):
        assert adam_w_mode
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "bias_correction": bias_correction})

    def zero_grad(self):
        super().zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert group["bias_correction"]
            for p in group["params"]:
                state, (beta1, beta2) = self.state[p], group["betas"]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                denominator = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1 ** group["step"]))


@pytest.fixture
def apex(monkeypatch):
    module = types.ModuleType("apex.optimizers")
    module.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)


def adam(optimizer, **options):
    """A model, its optimizer as on a GPU in fp16, and the optimizer's name."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    config = OptimConfig(optimizer=optimizer, learning_rate=0.1, adam_weight_decay=0.1)
    return model, *build_optimizer(model, config, torch.device("cuda"), "fp16", **options)


def take_steps(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def save(folder, model, optimizer):
    contents = TrainingTensors(model, {}, optimizer).gather()
    return save_checkpoint(folder, {"step": 3}, contents, 1, 0)


@pytest.mark.parametrize(("first", "then"), [*itertools.permutations(("adamw", "apex_fused_adam"))])
def test_apex_and_torch_resume_each_others_runs(apex, tmp_path, first, then):
    whole, optimizer, _ = adam("adamw")
    take_steps(whole, optimizer, range(6))
    model, optimizer, name = adam(first)
    assert name == ("apex FusedAdam" if first == "apex_fused_adam" else "torch AdamW (fused)")
    take_steps(model, optimizer, range(3))
    checkpoint = save(tmp_path, model, optimizer)
    resumed, optimizer, _ = adam(then)
    TrainingTensors(resumed, {}, optimizer).load(checkpoint)
    take_steps(resumed, optimizer, range(3, 6))
    torch.testing.assert_close(list(resumed.parameters()), list(whole.parameters()))
    assert {float(s["step"]) for s in optimizer.state_dict()["state"].values()} == {6}


def test_a_checkpoint_of_version_0_1_0_with_apexs_count_by_group_is_resumed(apex, tmp_path):
    whole, optimizer, _ = adam("adamw")
    take_steps(whole, optimizer, range(6))
    model, optimizer, _ = adam("apex_fused_adam")
    take_steps(model, optimizer, range(3))
    contents = TrainingTensors(model, {}, optimizer).gather()
    moments = contents["optimizer.safetensors"]
    contents["optimizer.safetensors"] = {key: x for key, x in moments.items() if not key.endswith("/step")}
    for group in contents["optimizer.json"]["param_groups"]:
        group["step"] = 3
    checkpoint = save_checkpoint(tmp_path, {"step": 3}, contents, 1, 0)
    resumed, optimizer, _ = adam("adamw")
    TrainingTensors(resumed, {}, optimizer).load(checkpoint)
    take_steps(resumed, optimizer, range(3, 6))
    torch.testing.assert_close(list(resumed.parameters()), list(whole.parameters()))


def test_apex_is_used_where_it_is_named_and_can_be(apex, monkeypatch):
    assert adam("adamw")[2] == "torch AdamW (fused)"
    assert adam("apex_fused_adam", sharded=True)[2] == "torch AdamW (fused)"  # it finds no memory behind a DTensor
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    assert adam("apex_fused_adam")[2] == "torch AdamW (fused)"


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
