"""What a run says before its first step and after its last."""

import re
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from training_runs import changed

from dit_hf.training import announce as module
from dit_hf.training.trainer import Trainer, train


@pytest.fixture(autouse=True)
def precision_is_not_remembered():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def said(config, capsys, **options):
    run = changed(config, train=options)
    Trainer(run).announce(Path(run.train.output_dir))
    return capsys.readouterr().out


def test_batch_steps_and_disk_are_computed(config, capsys):
    text = said(config, capsys, global_batch_size=8, gradient_accumulation_steps=2, max_train_steps=49)
    assert "batch      8 = 1 rank x 2 micro-batches x 4 images" in text
    assert "images     196; an epoch is 24.5 steps, the run is 49 steps or 2 epochs" in text
    # 4 checkpoints are kept and one more is written before the oldest goes.
    size, whole = (float(number) for number in re.search(r"checkpoints of ([\d.]+) GB, ([\d.]+) GB", text).groups())
    assert whole == pytest.approx(5 * size, abs=0.1)
    assert "parameters, float32, " in text
    assert "tracker" not in text


def test_sample_grids_that_leave_the_machine_are_announced(config, capsys, monkeypatch):
    """Said before the first step, with the options that keep them."""
    assert "privacy" not in said(config, capsys)
    monkeypatch.setattr("dit_hf.training.trainer.is_online", lambda tracker, options: True)
    assert "privacy    sample grids, which may resemble training images, leave this machine" in said(config, capsys)


def test_memory_that_is_short_names_the_option_that_helps(config, capsys, monkeypatch):
    fixed = 4 * 4 * sum(p.numel() for p in Trainer(config).transformer.parameters())
    monkeypatch.setattr(module, "free_memory", lambda device: ("memory", fixed + 2 * 10**6))
    text = said(config, capsys, global_batch_size=64)
    assert "an estimate" in text
    parts = int(re.search(r"probably too little; --train.gradient_accumulation_steps (\d+) would fit", text)[1])
    assert "too little" not in said(config, capsys, global_batch_size=64, gradient_accumulation_steps=parts)
    monkeypatch.setattr(module, "free_memory", lambda device: ("memory", fixed // 2))
    with pytest.raises(OSError, match=r"weights, gradients, optimizer and EMA alone need .* train a smaller model"):
        said(config, capsys)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_estimated_activations_are_near_what_autograd_saves(config, precision):
    trainer = Trainer(
        changed(config, model={"attention_head_dim": 64, "num_layers": 4}, train={"mixed_precision": precision})
    )
    weights = {p.untyped_storage().data_ptr() for p in trainer.transformer.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    held = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.step.accumulate(0)
    half = precision != "no"
    estimate = 8 * module.activation_bytes(trainer.step, half, compiled=False, checkpointed=False)
    assert 0.5 < estimate / sum(saved.values()) < 2


def test_a_dry_run_leaves_nothing(config, tmp_path, capsys):
    train(config, dry_run=True)
    assert "parameters" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_without_a_terminal_a_run_is_readable_lines(config, capsys):
    train(config)
    out, err = capsys.readouterr()
    assert "\r" not in out + err
    lines = [line for line in err.splitlines() if line.startswith("training: ")]
    assert [line.split(" steps")[0] for line in lines][:3] == [f"training: {step} of 8" for step in (3, 4, 6)]
    assert re.match(r"training: 3 of 8 steps, loss \d\.\d{4}, [\d,]+ images/s, 0:00:0\d left", lines[0])
    assert re.search(r"step 4: validation loss \d\.\d{4}, the best so far", err)
    assert sum(line.startswith("training: 8 of 8 steps") for line in lines) == 1
    ends = [line for line in out.splitlines() if line.startswith(("finished", "next"))]
    assert ends[0].startswith(f"finished   {config.train.output_dir}: 8 steps, loss ")
    assert ends[1] == f"next       dit-hf sample {config.train.output_dir} --output_dir samples"
