"""A run whose numbers are not finite stops, and names the layer where it began."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from training_runs import changed, half_precision

from dit_hf.training.trainer import Trainer, train


@pytest.mark.parametrize("layer", ["proj_in", "transformer_blocks.1.ff.net.2"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_layer(config, layer):
    run = train(changed(config, train={"max_train_steps": 4}))
    trainer = Trainer(changed(config, train={"resume_from_checkpoint": "latest"}))
    wrong = trainer.transformer.get_submodule(layer)
    wrong.register_forward_hook(lambda _module, _inputs, output: output * float("inf"))
    message = (
        rf"not finite at step 5; first not finite: forward of {layer}; the last good checkpoint is .*checkpoint-4"
    )
    with pytest.raises(ValueError, match=message):
        trainer.fit(run)
    assert [path.name for path in sorted(run.glob("checkpoint-*"))] == ["checkpoint-4"]


def test_a_gradient_that_is_not_finite_changes_nothing_and_stops_the_run(config):
    run = train(changed(config, train={"max_train_steps": 4}))
    trainer = Trainer(changed(config, train={"resume_from_checkpoint": "latest"}))
    trainer.tensors.load(run / "checkpoint-4")
    before = {name: weight.clone() for name, weight in trainer.transformer.state_dict().items()}
    handle = trainer.transformer.proj_in.weight.register_hook(lambda gradient: gradient * float("nan"))
    assert not torch.isfinite(trainer.step(4))
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.transformer.state_dict().items())
    assert all(
        torch.equal(value, load_file(run / "checkpoint-4" / "ema.safetensors")[name])
        for name, value in trainer.tensors.ema_weights("ema").items()
    )
    with pytest.raises(ValueError, match=r"gradient is not finite at step 5; first not finite: gradient of proj_in"):
        trainer.fit(run)
    handle.remove()


def test_a_loss_scale_that_keeps_falling_stops_the_run_and_names_the_layer(config, monkeypatch):
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    config = changed(config, train={"max_train_steps": 100, "logging_steps": 10, "checkpointing_steps": 100})
    trainer = Trainer(config)
    half_precision(trainer, 2.0**8)
    trainer.transformer.transformer_blocks[0].attn.to_q.register_full_backward_hook(
        lambda _module, gradients, _outputs: tuple(None if g is None else g * float("inf") for g in gradients)
    )
    message = (
        r"the loss scale has fallen to 0.25 at step 1; first not finite: backward of transformer_blocks\.0\.attn\.to_q"
    )
    with pytest.raises(ValueError, match=message):
        trainer.fit(Path(config.train.output_dir))
    assert not list(Path(config.train.output_dir).glob("checkpoint-*"))
