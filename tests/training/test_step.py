"""A step follows its formulas; what makes it faster changes rounding alone; on a GPU nothing in it waits."""

import importlib.util
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from training_runs import changed, rows

from dit_hf.config import OptimConfig
from dit_hf.training.objective import sample_flips, sample_step_randomness
from dit_hf.training.optimizer import build_optimizer
from dit_hf.training.trainer import Trainer, train

gpu = pytest.mark.gpu
NO_GPU = not torch.cuda.is_available()
STEPS = 4
ROTARY = {"qk_norm": "rms_norm", "use_rotary_positional_embeddings": True}
either_model = pytest.mark.parametrize("model", [{}, ROTARY], ids=["classic", "rotary"])


def losses(config, **train):
    """Mean loss of each of the first steps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(changed(config, train={"mixed_precision": "no", **train}))
    means = []
    for step in range(STEPS):
        trainer.step.begin_window()
        trainer.step(step)
        total, count = trainer.step.window.cpu().sum(1).tolist()
        means.append(total / count)
    return torch.tensor(means)


def hide_apex(monkeypatch):
    for name in ("apex", "apex.optimizers"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture(autouse=True)
def precision_is_not_remembered():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def plain():
    """Losses of the plain step by recipe: computed once."""
    return {}


@gpu
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"torch_compile": True}, marks=pytest.mark.slow),
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2},
        {"deterministic": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option_of_speed_and_memory_gives_the_same_losses(config, options, plain):
    if "losses" not in plain:
        plain["losses"] = losses(config)
    try:
        torch.testing.assert_close(losses(config, **options), plain["losses"], rtol=2e-5, atol=0)
    finally:
        torch.use_deterministic_algorithms(False)
        torch._inductor.config.deterministic = False
    assert plain["losses"].unique().numel() == STEPS


@gpu
@either_model
def test_half_precision_follows_full_precision(config, model):
    config = changed(config, model=model)
    full = losses(config)
    difference = (losses(config, mixed_precision="bf16") / full - 1).abs()
    assert 0 < difference.max() < 0.02  # and it is half precision that was used


@gpu
@pytest.mark.skipif(NO_GPU, reason="no GPU")
@either_model
def test_fp16_follows_full_precision_on_a_gpu(config, model):
    config = changed(config, model=model)
    full = losses(config)
    assert 0 < (losses(config, mixed_precision="fp16") / full - 1).abs().max() < 0.02


@gpu
@pytest.mark.skipif(NO_GPU, reason="no GPU")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "no"])
def test_nothing_in_a_step_waits_for_the_gpu(config, precision, optimizer):
    train = {"mixed_precision": precision}
    trainer = Trainer(changed(config, model=ROTARY, optim={"optimizer": optimizer}, train=train))
    trainer.step(0)  # the first step sets things up
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, STEPS):
            trainer.step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.skipif(NO_GPU, reason="no GPU")
@pytest.mark.skipif(importlib.util.find_spec("apex") is None, reason="no apex")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_apex_and_torch_take_the_same_steps(config, weight_decay, monkeypatch):
    """On the same float32 gradients; a run has apex's in fp16 alone."""

    def weights():
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = Trainer(changed(config, train={"mixed_precision": "no"}))
        adam = OptimConfig("apex_fused_adam", learning_rate=config.optim.learning_rate, adam_weight_decay=weight_decay)
        optimizer, name = build_optimizer(trainer.transformer, adam, trainer.device, "fp16")
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            for parameter in trainer.transformer.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(trainer.device)
            optimizer.step()
        return name, [p.detach().clone() for p in trainer.transformer.parameters()]

    name, by_apex = weights()
    assert name == "apex FusedAdam"
    hide_apex(monkeypatch)
    name, by_torch = weights()
    assert name == "torch AdamW (fused)"
    torch.testing.assert_close(by_apex, by_torch, rtol=1e-4, atol=1e-5)


def test_accumulation_changes_nothing_but_rounding(config, tmp_path):
    runs = []
    for accumulation in (1, 4):
        folder = str(tmp_path / f"accumulation-{accumulation}")
        runs.append(train(changed(config, train={"output_dir": folder, "gradient_accumulation_steps": accumulation})))
    for one, other in zip(*(rows(run) for run in runs), strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-4)
        assert float(one["grad_norm"]) == pytest.approx(float(other["grad_norm"]), rel=1e-3)


def test_loss_follows_the_formulas(config):
    """One step by hand: read, sample, normalise, noise, predict, weigh."""
    trainer = Trainer(config)
    before = {name: p.detach().clone() for name, p in trainer.transformer.named_parameters()}
    trainer.step(5)
    loss = trainer.step.window[0].sum() / 8
    randomness = sample_step_randomness(config.objective, 0, 5, (8, 4, 8, 8), 22, torch.device("cpu"))
    batch = trainer.reader.batch(0, 40, 8, sample_flips(0, 5, 8))
    mean, std = (torch.from_numpy(batch[name]).float() for name in ("latent_mean", "latent_std"))
    statistics = trainer.reader.info["statistics"]
    clean = mean + std * randomness.posterior_noise
    clean = (clean - torch.tensor(statistics["mean"]).view(4, 1, 1)) / torch.tensor(statistics["std"]).view(4, 1, 1)
    alpha, sigma = (x.view(-1, 1, 1, 1) for x in trainer.step.scheduler.levels(randomness.timesteps))
    ids = torch.where(randomness.keep, torch.from_numpy(batch["condition_ids"]), 2)
    trainer.transformer.load_state_dict(before, strict=False)
    with torch.no_grad():
        output = trainer.transformer(alpha * clean + sigma * randomness.noise, randomness.timesteps, ids).sample
    snr = (alpha / sigma).square()
    weight = snr.clamp(max=5) / (snr + 1)
    expected = (weight * (output - (alpha * randomness.noise - sigma * clean)).square()).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
