"""Pushes in the background of a run, which no failure of the Hub disturbs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from conftest import tiny_pipeline
from safetensors.torch import load
from training_runs import assert_same_bits, changed, comparable

from dit_hf.hub.background_push import BackgroundPush
from dit_hf.training.trainer import train


def sharing(config, folder, **options):
    options = {"push_to_hub": True, "hub_model_id": "you/faces", "push_to_hub_steps": 4, **options}
    return changed(config, train={"output_dir": str(folder), **options})


def test_a_run_is_pushed_during_training_and_at_its_end(hub, config, tmp_path, capsys):
    commits = []
    stored = hub.stored

    class Watched(dict):
        def __setitem__(self, oid, content):
            super().__setitem__(oid, content)
            if len(content) > 100_000 and "transformer_blocks.0.attn.to_q.weight" in load(content):
                commits.append(load(content)["transformer_blocks.0.attn.to_q.weight"])

    hub.stored = Watched(stored)
    run = train(sharing(config, tmp_path / "run", hub_private_repo=True))
    output = capsys.readouterr().out
    assert f"step 4 is now {hub.endpoint}/you/faces" in output
    assert f"step 8 is now {hub.endpoint}/you/faces" in output
    assert len(commits) == 2
    assert not (commits[0] == commits[1]).all()
    assert hub.private["you/faces"]
    files = hub.repositories["you/faces"]
    exported = (run / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert files["transformer/diffusion_pytorch_model.safetensors"] == exported
    assert files["training_log.csv"] == (run / "training_log.csv").read_bytes()
    assert not any("optimizer" in name or "checkpoint" in name for name in files)
    assert re.search(r"\| steps \| 8 \|", files["README.md"].decode())
    assert not (run / ".push").exists()
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name


@pytest.mark.parametrize("failure", ["connection", "token", "content"])
def test_a_failure_of_the_hub_is_logged_and_changes_nothing_of_the_run(
    hub, config, tmp_path, capsys, monkeypatch, failure
):
    quiet = train(changed(config, train={"output_dir": str(tmp_path / "quiet")}))
    if failure == "connection":
        hub.broken = {"POST */commit/*"}
    elif failure == "token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    else:
        hub.repositories["you/faces"] = {"notes.md": b"mine"}
    capsys.readouterr()
    run = train(sharing(config, tmp_path / "loud"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "was not pushed" in line]
    reason = {"connection": "you/faces: ", "token": "log in with", "content": "holds something else already"}[failure]
    assert len(lines) == 2  # of step 4, and again at the end
    assert all(reason in line for line in lines)
    assert_same_bits(quiet / "checkpoint-8", run / "checkpoint-8")
    undisturbed, disturbed = comparable(quiet), comparable(run)
    assert [row["loss"] for row in undisturbed if row["step"] == "8"] == [
        row["loss"] for row in disturbed if row["step"] == "8"
    ]
    assert (run / "pipeline" / "model_index.json").is_file()
    if failure == "content":
        assert hub.repositories["you/faces"] == {"notes.md": b"mine"}
    elif failure == "connection":  # the same run, called again, pushes its exported model
        hub.broken = set()
        train(sharing(config, tmp_path / "loud", resume_from_checkpoint="latest"))
        assert "model_index.json" in hub.repositories["you/faces"]


def test_a_running_push_is_not_overtaken_and_a_full_disk_is_logged(hub, tmp_path, monkeypatch):
    lines, gate = [], threading.Event()
    push = BackgroundPush("you/faces", False, None, lines.append)

    def slow(folder, *options):
        gate.wait()
        return "there"

    monkeypatch.setattr("dit_hf.hub.background_push.upload", slow)
    write = tiny_pipeline().save_pretrained
    push.begin(tmp_path / ".push", "step 1", write)
    push.begin(tmp_path / ".push", "step 2", write)
    gate.set()
    push.wait()
    assert lines == ["step 2 is not pushed: the previous push is still running", "step 1 is now there"]

    def full(folder):
        raise OSError(28, "No space left on device")

    push.begin(tmp_path / ".push", "step 3", full)
    push.wait()
    assert lines[-1].startswith("step 3 was not pushed: [Errno 28] No space left on device; training continues")


def test_a_repository_must_be_named(config):
    with pytest.raises(ValueError, match="push_to_hub needs train"):
        train(changed(config, train={"push_to_hub": True}))


@pytest.mark.slow
def test_a_run_killed_while_it_pushes_leaves_the_repository_whole(hub, config, tmp_path):
    """The repository has all of a push or nothing; the resumed run pushes again."""
    config = sharing(config, tmp_path / "run", push_to_hub_steps=2, max_train_steps=200, checkpointing_steps=2)
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "dit_hf", "train", "--config", str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, **hub.environment()}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while not any(request.startswith("PUT") for request in hub.requests):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    files = hub.repositories.get("you/faces", {})
    assert set(files) <= {".gitattributes"} or json.loads(files["model_index.json"])
    steps = max(int(path.name.removeprefix("checkpoint-")) for path in (tmp_path / "run").glob("checkpoint-*")) + 2
    limit = ["--train.max_train_steps", str(steps), "--train.resume_from_checkpoint", "latest"]
    subprocess.run([*command, *limit], env=environment, check=True, capture_output=True)
    assert f"| steps | {steps} |" in hub.repositories["you/faces"]["README.md"].decode()
    shutil.rmtree(tmp_path / "run")
