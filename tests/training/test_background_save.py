"""Checkpoints are written while training continues, and are those of their step all the same."""

import threading
from pathlib import Path

import pytest
import torch
from training_runs import assert_same_bits, changed, rows

from dit_hf.training import background_save
from dit_hf.training.background_save import BackgroundSave
from dit_hf.training.checkpoint import save_checkpoint
from dit_hf.training.step import TrainingStep
from dit_hf.training.trainer import train


@pytest.fixture
def written_later(monkeypatch):
    """Hold each checkpoint back until the training has taken another step, or is over; return when they were."""
    began, stepped = [], threading.Event()

    def save_later(run, state, *rest):
        began.append((state["step"], stepped.wait(0.2 if state["step"] == 8 else 60)))
        return save_checkpoint(run, state, *rest)

    def step(trainer_step, number, call=TrainingStep.__call__):
        result = call(trainer_step, number)
        stepped.set() if number % 4 == 1 else stepped.clear()
        return result

    monkeypatch.setattr(background_save, "save_checkpoint", save_later)
    monkeypatch.setattr(TrainingStep, "__call__", step)
    return began


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_taken_while_a_checkpoint_is_written_do_not_change_it(config, tmp_path, optimizer, request):
    config = changed(config, optim={"optimizer": optimizer})
    before = train(config)
    began = request.getfixturevalue("written_later")
    after = train(changed(config, train={"output_dir": str(tmp_path / "later")}))
    assert began == [(4, True), (8, False)]  # that of step 4 was written after step 6
    for checkpoint in ("checkpoint-4", "checkpoint-8"):
        assert_same_bits(before / checkpoint, after / checkpoint)
    assert [row["step"] for row in rows(after)] == [row["step"] for row in rows(before)]


def test_without_memory_for_a_copy_training_waits(config, written_later, monkeypatch, capsys):
    monkeypatch.setattr(background_save, "free_memory", lambda _: ("memory", 1000))
    monkeypatch.setattr(background_save, "save_checkpoint", save_checkpoint)
    run = train(config)
    assert "training waits for this checkpoint: a copy of 0.0 GB does not fit into 0.0 GB" in capsys.readouterr().out
    assert (run / "checkpoint-8").is_dir()


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_row(config, monkeypatch):
    """And not at the next checkpoint, which may be hours later."""

    def fail(run, state, *rest):
        raise OSError("no space")

    monkeypatch.setattr(background_save, "save_checkpoint", fail)
    with pytest.raises(OSError, match="no space"):
        train(changed(config, train={"max_train_steps": 400, "logging_steps": 1, "checkpointing_steps": 200}))
    log = rows(Path(config.train.output_dir))
    assert 200 <= int(log[-1]["step"]) < 400


def test_another_error_waits_for_the_checkpoint_and_is_the_one_that_is_raised(tmp_path):
    printed, release = [], threading.Event()
    saving = BackgroundSave(None, torch.device("cpu"), (1, 1), printed.append)

    def write():
        release.wait(60)
        raise OSError("no space")

    def fit():
        with saving:
            saving._under_way = saving._thread.submit(write)
            release.set()
            raise ValueError("loss is not finite")

    with pytest.raises(ValueError, match="loss is not finite"):
        fit()
    assert printed == ["the checkpoint under way was not written (no space); earlier ones are good"]
