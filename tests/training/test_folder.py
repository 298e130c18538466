"""Where a run may write, what it leaves alone, and when it throws what away."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import short_run
from training_runs import changed, comparable, rows

from dit_hf.config import Config
from dit_hf.hub.push import push
from dit_hf.runs import RunFolder, load_pipeline, read_run_config
from dit_hf.storage import sha256
from dit_hf.training.trainer import Trainer, train

LATEST = {"resume_from_checkpoint": "latest"}
BACK = {"resume_from_checkpoint": "checkpoint-4", "max_train_steps": 10}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, training_latents) -> Config:
    """The recipe of a finished run of 8 steps whose learning rate depends on its length. Not to be written to."""
    config = changed(
        short_run(training_latents, tmp_path_factory.mktemp("finished")),
        model={"num_layers": 1},
        optim={"lr_warmup_steps": 0, "lr_scheduler": "linear", "lr_decay_ratio": 1.0},
        train={"logging_steps": 2, "sampling_steps": 2, "validation_images": 4},
    )
    train(config)
    return config


@pytest.fixture
def copied(finished, tmp_path) -> Config:
    """The recipe of a copy of that run."""
    shutil.copytree(finished.train.output_dir, tmp_path / "run")
    return changed(finished, train={"output_dir": str(tmp_path / "run")})


def contents(run):
    """The hashes of all files of a run, but for the recipe, whose folder differs, and measured times."""
    files = [path for path in sorted(Path(run).rglob("*")) if path.is_file()]
    return {str(path.relative_to(run)): sha256(path) for path in files if path.name != "config.yaml"}


@pytest.mark.parametrize("steps", [0, 3], ids=["before-the-first-step", "after-some-rows-and-grids"])
def test_going_back_throws_nothing_away_before_its_first_checkpoint(copied, steps):
    """An attempt that fails leaves the run as it was, for `latest`, for `sample`, and in every byte."""
    run = Path(copied.train.output_dir)
    before = contents(run)
    trainer = Trainer(changed(copied, train={**BACK, "checkpointing_steps": 100}))
    original = trainer.step.accumulate

    def fail(step):
        if step >= 4 + steps:
            raise OSError("the machine burns")
        return original(step)

    trainer.step.accumulate = fail
    with pytest.raises(OSError, match="burns"):
        trainer.fit(run)
    left = contents(run)
    assert {name: digest for name, digest in left.items() if not name.startswith(".branch/")} == before
    load_pipeline(str(run), "cpu")  # the finished run can still be sampled
    train(changed(copied, train=LATEST))
    assert contents(run) == before


def test_going_back_ends_like_a_run_that_was_never_longer(finished, copied, tmp_path):
    run = train(changed(copied, train=BACK))
    # The learning rate of the shorter run differed: both begin with its first four steps.
    other = tmp_path / "other"
    shutil.copytree(finished.train.output_dir, other)
    shutil.rmtree(other / "checkpoint-8")
    for name in ("step-6.png", "step-8.png"):
        (other / "samples" / name).unlink()
    train(changed(finished, train={**LATEST, "output_dir": str(other), "max_train_steps": 10}))
    assert comparable(run) == comparable(other)
    for grid in ("step-2", "step-4", "step-6", "step-8", "step-10"):
        assert (run / "samples" / f"{grid}.png").read_bytes() == (other / "samples" / f"{grid}.png").read_bytes()
    assert not (run / ".branch").exists()


def test_a_branch_killed_after_its_first_checkpoint_is_finished_by_the_next_call(copied, monkeypatch):
    run = Path(copied.train.output_dir)
    config = changed(copied, train={**BACK, "checkpointing_steps": 6})
    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr("dit_hf.training.trainer.finish_branch", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        train(config)
    os.waitpid(pid, 0)
    assert (run / ".branch").is_dir()
    assert [path.name for path in sorted(run.glob("checkpoint-*"))] == ["checkpoint-4", "checkpoint-6"]
    train(changed(config, train=LATEST))
    assert [row["step"] for row in rows(run)] == ["2", "4", "6", "8", "10"]
    assert {path.name for path in run.glob("samples/*")} == {f"step-{step}.png" for step in (2, 4, 6, 8, 10)}
    assert not (run / ".branch").exists()


@pytest.mark.parametrize("damage", ["empty", "removed", "cut", "a BOM", "semicolons", "other columns"])
def test_a_log_that_somebody_touched_is_restored_from_the_checkpoint(finished, copied, damage, capsys):
    run = Path(copied.train.output_dir)
    log, text = run / "training_log.csv", (run / "training_log.csv").read_text()
    damaged = {
        "empty": "",
        "cut": text[: len(text) // 2],
        "a BOM": "\ufeff" + text,
        "semicolons": text.replace(",", ";"),
        "other columns": "a,b\n1,2\n",
    }
    log.unlink() if damage == "removed" else log.write_text(damaged[damage])
    train(changed(copied, train={**LATEST, "max_train_steps": 9}))
    assert log.read_text().startswith(text)
    assert [row["step"] for row in rows(run)] == ["2", "4", "6", "8", "9"]
    aside = run / "training_log-unread.csv"
    if damage in ("semicolons", "other columns"):
        assert aside.read_text() == damaged[damage]
        assert "training_log-unread.csv; the rows come from the checkpoint" in capsys.readouterr().out
    else:
        assert not aside.exists()


def test_a_log_that_is_deleted_during_the_training_begins_anew(copied):
    trainer = Trainer(changed(copied, train={**LATEST, "max_train_steps": 12}))
    run = Path(copied.train.output_dir)
    original = trainer.step.accumulate

    def delete(step):
        (run / "training_log.csv").unlink(missing_ok=True)
        return original(step)

    trainer.step.accumulate = delete
    trainer.fit(run)
    assert [row["step"] for row in rows(run)] == ["12"]


def test_a_pipeline_that_is_damaged_is_refused_and_exported_again(finished, copied, tmp_path):
    run = Path(copied.train.output_dir)
    good = contents(run / "pipeline")
    weights = next((run / "pipeline" / "transformer").glob("*.safetensors"))

    def flip():
        data = bytearray(weights.read_bytes())
        data[-1] ^= 4
        weights.write_bytes(data)

    def foreign():
        shutil.rmtree(run / "pipeline")
        train(changed(finished, train={"output_dir": str(tmp_path / "foreign"), "seed": 1, "max_train_steps": 1}))
        shutil.copytree(tmp_path / "foreign" / "pipeline", run / "pipeline")

    for damage in (flip, foreign, lambda: shutil.rmtree(run / "pipeline" / "vae")):
        damage()
        with pytest.raises(ValueError, match="resume_from_checkpoint latest exports it again"):
            push(str(run), output_dir=str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()
        train(changed(copied, train=LATEST))
        assert contents(run / "pipeline") == good


def test_a_finished_run_removes_checkpoints_that_a_killed_process_left(copied):
    run = Path(copied.train.output_dir)
    assert [path.name for path in RunFolder(run).checkpoints()] == ["checkpoint-4", "checkpoint-8"]
    train(changed(copied, train={**LATEST, "checkpoints_total_limit": 1, "best_checkpoints_limit": 0}))
    assert [path.name for path in RunFolder(run).checkpoints()] == ["checkpoint-8"]


@pytest.mark.parametrize("text", ["[]", "null", "x", "", '{"training": 5}', '{"training": {"steps": 1}}'])
def test_a_damaged_export_is_named_and_written_again(copied, text, tmp_path):
    run = Path(copied.train.output_dir)
    good = json.loads((run / "export.json").read_text())
    (run / "export.json").write_text(text)
    with pytest.raises(ValueError, match=r"export\.json is damaged .*; delete it, and train with"):
        load_pipeline(str(run), "cpu")
    train(changed(copied, train=LATEST))
    assert json.loads((run / "export.json").read_text()) == good


@pytest.mark.parametrize("damage", ["half", "empty", "list", "flip", "gone"])
def test_a_damaged_recipe_of_a_run_is_named(copied, damage):
    run = Path(copied.train.output_dir)
    path, text = run / "config.yaml", (run / "config.yaml").read_text()
    damaged = {"half": text[: len(text) // 2], "empty": "", "list": "[]", "flip": text.replace("loss:", "losq:")}
    path.unlink() if damage == "gone" else path.write_text(damaged[damage])
    with pytest.raises((ValueError, OSError), match=r"config\.yaml"):
        load_pipeline(str(run / "checkpoint-8"), "cpu")


def test_a_runs_relative_paths_are_found_from_any_folder(finished, training_latents, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latents").symlink_to(training_latents)
    monkeypatch.chdir(tmp_path)
    where = {"output_dir": "runs/x", "max_train_steps": 1}
    train(changed(finished, data={"latents": "runs/latents"}, train=where))
    for folder, run in (("runs", "x"), ("runs/x", "."), ("/", str(tmp_path / "runs" / "x"))):
        monkeypatch.chdir(tmp_path / folder)
        assert Path(read_run_config(Path(run)).data.latents).samefile(training_latents)
        load_pipeline(f"{run}/checkpoint-1", "cpu")


def test_files_of_others_are_in_the_way_and_stay(finished, tmp_path):
    for number, name in enumerate(
        ("README.md", "pipeline/mine.txt", "samples/step-900.png", "training_log.csv", "config.yaml", "best.json")
    ):
        run = tmp_path / str(number)
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text("a,b\n1,2\n")
        for resume in (None, "latest"):
            config = changed(finished, train={"output_dir": str(run), "resume_from_checkpoint": resume})
            with pytest.raises(FileExistsError, match=rf"holds {name.split('/')[0]}.*, which no run has written"):
                train(config)
        assert [path for path in run.rglob("*") if path.is_file()] == [run / name]
        assert (run / name).read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize("made", ["before", "during"])
def test_a_folder_of_others_in_the_place_of_the_pipeline_stays(copied, made):
    run = Path(copied.train.output_dir)
    shutil.rmtree(run / "pipeline")
    trainer = Trainer(changed(copied, train=LATEST))
    (run / "pipeline").mkdir()
    (run / "pipeline" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"pipeline holds something else .*; move it and call again"):
        train(changed(copied, train=LATEST)) if made == "before" else trainer.fit(run)
    assert (run / "pipeline" / "mine.txt").read_text() == "mine"
    shutil.rmtree(run / "pipeline")
    train(changed(copied, train=LATEST))
    load_pipeline(str(run))


def test_a_start_that_failed_blocks_no_other(finished, tmp_path):
    config = changed(finished, train={"output_dir": str(tmp_path / "run"), "max_train_steps": 1})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.log").write_text("mine")
    trainer = Trainer(config)
    trainer.step.accumulate = lambda step: (_ for _ in ()).throw(OSError("no compiler"))
    with pytest.raises(OSError, match="no compiler"):
        trainer.fit(tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").is_file()
    train(config)
    assert (tmp_path / "run" / "train.log").read_text() == "mine"
    assert len(rows(tmp_path / "run")) == 1
