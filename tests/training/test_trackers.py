"""Trackers, which never stop a run."""

import importlib.machinery
import importlib.metadata
import importlib.util
import shutil
import sys

import pytest
import wandb
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import changed

from dit_hf.runs import read_log
from dit_hf.training.trackers import _wandb_id, _wandb_run, choose_tracker, is_online
from dit_hf.training.trainer import train


def test_wandb_without_a_login_is_offline_and_never_prompts(config, tmp_path, monkeypatch, capsys):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config.train.report_to = "wandb"
    run = train(config)
    assert capsys.readouterr().out.startswith("no wandb login")
    with pytest.raises(ValueError, match="divisible"):
        train(changed(config, train={"output_dir": str(tmp_path / "other"), "gradient_accumulation_steps": 3}))
    assert capsys.readouterr().out == ""  # a refusal is one line
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
    wandb.teardown()  # or it would keep running without the environment that other tests set


def test_a_wandb_that_may_prompt_for_a_login_is_not_used(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.30.1")
    lines = []
    assert choose_tracker("wandb", lines.append) == (None, {})
    assert "is too old: the run is logged to training_log.csv only (pip install 'wandb>=0.31')" in lines[0]


def test_a_tracker_that_is_not_installed_is_reported_and_not_used(monkeypatch):
    # A folder of that name in the current one is found as a package without a file.
    folder = importlib.machinery.ModuleSpec("tensorboard", None, is_package=True)
    for found in (None, folder):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
        lines = []
        assert choose_tracker("tensorboard", lines.append) == (None, {})
        assert "not installed" in lines[0]


@pytest.mark.parametrize(
    ("variable", "value"), [("WANDB_DISABLED", "true"), ("WANDB_DISABLED", "1"), ("WANDB_MODE", "disabled")]
)
def test_wandb_can_be_switched_off(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    lines = []
    assert choose_tracker("wandb", lines.append) == (None, {})
    assert lines[0].startswith(variable)


def test_online_without_a_login_is_offline_with_a_line(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online")
    for reason, login in (("no wandb login", False), ("wandb: the server refuses", wandb.Error("the server refuses"))):
        monkeypatch.setattr(wandb, "login", raising(login) if isinstance(login, Exception) else lambda **_: False)
        lines = []
        assert choose_tracker("wandb", lines.append) == ("wandb", {"mode": "offline"})
        assert lines[0].startswith(f"{reason}: the run is logged offline")


def raising(error):
    def call(*_, **__):
        raise error

    return call


def test_a_tracker_that_fails_ends_no_training(config, monkeypatch, capsys):
    config = changed(config, train={"report_to": "tensorboard"})
    for method in ("init_trackers", "log", "end_training"):
        with monkeypatch.context() as patch:
            patch.setattr(Accelerator, method, raising(RuntimeError("the server is gone\nand more")))
            run = train(changed(config, train={"output_dir": f"{config.train.output_dir}-{method}"}))
        assert len(read_log(run)) == 4
        out = capsys.readouterr().out
        message = "the tracker failed (RuntimeError: the server is gone): the run is logged to training_log.csv only"
        assert out.count(message) == 1


def test_what_wandbs_variables_set_is_left_to_them(tmp_path, monkeypatch):
    assert {name: _wandb_run(tmp_path, print)[name] for name in ("name", "dir", "resume")} == {
        "name": tmp_path.name,
        "dir": str(tmp_path),
        "resume": "allow",
    }
    for name in ("WANDB_NAME", "WANDB_DIR", "WANDB_RESUME", "WANDB_RUN_ID"):
        monkeypatch.setenv(name, "mine")
    assert _wandb_run(tmp_path, print) == {}


def test_a_copy_is_another_run_of_wandb_and_a_moved_run_is_not(tmp_path):
    lines = []
    (tmp_path / "run").mkdir()
    first = _wandb_id(tmp_path / "run", lines.append)
    assert _wandb_id(tmp_path / "run", lines.append) == first
    (tmp_path / "run").rename(tmp_path / "moved")
    assert _wandb_id(tmp_path / "moved", lines.append) == first
    assert lines == []
    shutil.copytree(tmp_path / "moved", tmp_path / "copy")
    second = _wandb_id(tmp_path / "copy", lines.append)
    assert second != first
    assert lines == [f"{tmp_path / 'copy'} is a copy of another run, and is another run of wandb"]
    assert _wandb_id(tmp_path / "copy", lines.append) == second
    assert _wandb_id(tmp_path / "moved", lines.append) == first


def test_tensorboard_shows_what_the_log_has_after_going_back(config):
    config = changed(config, optim={"lr_scheduler": "linear", "lr_decay_ratio": 1.0}, train={"logging_steps": 1})
    config = changed(config, train={"report_to": "tensorboard"})
    train(config)
    run = train(changed(config, train={"resume_from_checkpoint": "checkpoint-4", "max_train_steps": 6}))
    shown = EventAccumulator(str(run / "dit_hf"), {"scalars": 0}).Reload().Scalars("learning_rate")
    logged = {int(row["step"]): float(row["learning_rate"]) for row in read_log(run)}
    assert {event.step: event.value for event in shown} == pytest.approx(logged, rel=1e-6)
    assert [event.step for event in shown] == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_keeps_its_wandb_id(config):
    config = changed(config, train={"report_to": "wandb", "max_train_steps": 4})
    train(config)
    run = train(changed(config, train={"max_train_steps": 8, "resume_from_checkpoint": "latest"}))
    ids = [path.stem.removeprefix("run-") for path in run.glob("wandb/offline-run-*/*.wandb")]
    assert ids == [(run / "wandb_id").read_text().splitlines()[0]] * 2


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


def test_trackio_gets_the_log_and_the_sample_grids_of_both_parts_of_a_run(config, monkeypatch, capsys):
    for name in ("TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads its folder when it is imported
    config = changed(config, train={"report_to": "trackio", "sampling_steps": 4, "max_train_steps": 4})
    train(config)
    run = train(changed(config, train={"max_train_steps": 8, "resume_from_checkpoint": "latest"}))
    assert "Trackio" not in capsys.readouterr().out

    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs("dit_hf") == [run.name]
    rows = SQLiteStorage.get_logs("dit_hf", run.name)
    shown = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert shown == pytest.approx({int(row["step"]): float(row["loss"]) for row in read_log(run)}, rel=1e-6)
    assert [row["step"] for row in rows if "samples" in row] == [4, 8]
    assert len(list((run / "trackio" / "media").rglob("*.png"))) == 2


@pytest.mark.parametrize(
    ("variable", "online"), [("TRACKIO_SPACE_ID", True), ("TRACKIO_SERVER_URL", True), ("TRACKIO_DIR", False)]
)
def test_trackio_leaves_the_machine_for_a_space_or_a_server(monkeypatch, variable, online):
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "somewhere")
    assert is_online("trackio", {}) is online


@pytest.mark.parametrize(
    ("tracker", "options", "mode", "online"),
    [
        ("wandb", {}, "", True),
        ("wandb", {}, "offline", False),
        ("wandb", {"mode": "offline"}, "", False),
        ("tensorboard", {}, "", False),
        (None, {}, "", False),
    ],
)
def test_a_run_knows_whether_its_sample_grids_leave_the_machine(monkeypatch, tracker, options, mode, online):
    monkeypatch.setenv("WANDB_MODE", mode)
    assert is_online(tracker, options) is online
