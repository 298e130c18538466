"""Trackers, which never stop a run."""

import importlib.metadata
import importlib.util

import pytest
import wandb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import changed

from dit_hf.runs import read_log
from dit_hf.training.trackers import choose_tracker
from dit_hf.training.trainer import train


def test_wandb_without_a_login_is_offline_and_never_prompts(config, tmp_path, monkeypatch, capsys):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config.train.report_to = "wandb"
    run = train(config)
    assert "no wandb login" in capsys.readouterr().out
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
    wandb.teardown()  # or it would keep running without the environment that other tests set


def test_a_wandb_that_may_prompt_for_a_login_is_not_used(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.30.1")
    lines = []
    assert choose_tracker("wandb", lines.append) == (None, {})
    assert "is too old: the run is logged to training_log.csv only (pip install 'wandb>=0.31')" in lines[0]


def test_a_tracker_that_is_not_installed_is_reported_and_not_used(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    lines = []
    assert choose_tracker("tensorboard", lines.append) == (None, {})
    assert "not installed" in lines[0]


def test_a_resumed_run_keeps_its_wandb_id(config):
    config = changed(config, train={"report_to": "wandb", "max_train_steps": 4})
    train(config)
    run = train(changed(config, train={"max_train_steps": 8, "resume_from_checkpoint": "latest"}))
    ids = [path.stem.removeprefix("run-") for path in run.glob("wandb/offline-run-*/*.wandb")]
    assert ids == [(run / "wandb_id").read_text()] * 2


def test_tensorboard_gets_the_log_and_the_sample_grids(config):
    run = train(changed(config, train={"report_to": "tensorboard", "sampling_steps": 4}))
    events = EventAccumulator(str(run / "dit_hf"), {"scalars": 0, "images": 0}).Reload()
    for column in ("loss", "validation_loss", "grad_norm", "loss_level_9"):
        logged = {row["step"]: float(row[column]) for row in read_log(run) if row[column]}
        shown = {str(event.step): event.value for event in events.Scalars(column)}
        assert shown == pytest.approx(logged, rel=1e-6)
    grids = events.Images("samples")
    assert [grid.step for grid in grids] == [4, 8]
    with Image.open(run / "samples" / "step-8.png") as grid:
        assert (grids[-1].width, grids[-1].height) == grid.size
