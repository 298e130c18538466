"""Runs that are killed, preempted, distributed over ranks and sharded: each in a process of its own, or several."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import short_run
from diffusers import DiffusionPipeline
from faulty_rank import errors_of_ranks
from safetensors.torch import load_file
from training_runs import assert_same_bits, changed, comparable, rows

from dit_hf.training.trainer import train
from dit_hf_cli import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "scripts" / "train.py")
PYTHON = [sys.executable, SCRIPT]
TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TORCHRUN = [*TWO_RANKS, SCRIPT]
SHARDED = [*TWO_RANKS, str(Path(__file__).with_name("fsdp2_on_cpu.py"))]
# One process a rank without a launcher: the batch script for SLURM, whose commands scripts here stand in for.
SLURM = Path(__file__).with_name("slurm")
SRUN = [
    "env",
    f"PATH={SLURM}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    "SLURM_JOB_NODELIST=127.0.0.1,127.0.0.2",
    f"SLURM_JOB_ID={os.getpid()}",
    "bash",
    str(ROOT / "examples" / "train.sbatch"),
]
CONFIG = ["--config_file", str(ROOT / "accelerate_config.yaml")]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", *CONFIG, SCRIPT]


def options(whole, run, *others):
    """Return the options of a run by the recipe of another, which resume it if it was started."""
    resume = ["--train.resume_from_checkpoint", "latest"]
    return ["--config", str(whole / "config.yaml"), "--train.output_dir", str(run), *resume, *others]


def command(launcher, whole, run, *others):
    return [*launcher, *options(whole, run, *others)]


def run_all(launcher, whole, run, *others):
    """Run to the end; by one process, in this one, which has imported everything."""
    if launcher is PYTHON:
        assert main(["train", *options(whole, run, *others)]) == 0
    else:
        subprocess.run(command(launcher, whole, run, *others), check=True)


def begin(command, run, row=1):
    """Start a run in a process group of its own and wait until its log has `row` rows."""
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "training_log.csv").is_file() and len(rows(run)) >= row:
            return process
        time.sleep(0.01)
    kill(process)
    raise AssertionError(process.communicate()[0].decode())


def kill(process):
    """Kill a run and all it started: torchrun's ranks are in sessions of their own and would survive."""
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.wait()


def assert_same_images(first, second):
    """Compare losses, which depend on the images, noise and timesteps seen; ranks add them up in another order."""
    for one, other in zip(rows(first), rows(second), strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), abs=1e-5)
        assert float(one["grad_norm"]) == pytest.approx(float(other["grad_norm"]), rel=1e-3)
        if one["validation_loss"]:
            assert float(one["validation_loss"]) == pytest.approx(float(other["validation_loss"]), abs=1e-5)


def test_killed_at_random_moments_a_run_ends_with_the_same_bits_and_log(tmp_path):
    result = tmp_path / "kill.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "kill.py"), "--kills", "10", "--json", str(result)]
    # Commands that ran in this process before have kept the folders of scripts from their children's path.
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert json.loads(result.read_text())["kills"] == 10


@pytest.fixture(scope="module")
def long_run(training_latents, tmp_path_factory):
    """A run of 300 steps, with a checkpoint in the middle. Not to be written to."""
    config = short_run(training_latents, tmp_path_factory.mktemp("long"))
    return train(changed(config, train={"max_train_steps": 300, "checkpointing_steps": 150, "logging_steps": 10}))


# torchrun hands the signal on and ends with 1; accelerate's launcher dies of it while the run still saves.
@pytest.mark.parametrize(
    ("launcher", "code"),
    [(PYTHON, 75), (SRUN, 75), (TORCHRUN, 1), (ACCELERATE, -signal.SIGTERM)],
    ids=["python", "srun", "torchrun", "accelerate"],
)
def test_a_preempted_run_saves_and_resumes_with_the_same_bits(long_run, tmp_path, launcher, code):
    whole, run = long_run, tmp_path / "stopped"
    process = begin(command(launcher, whole, run), run)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=120)[0].decode()  # waits for all who can write to it
    assert process.returncode == code, output
    (stopped,) = run.glob("checkpoint-*")
    assert f"preempted: {stopped.name} is saved" in output
    assert ("requeued" in output) == (launcher is SRUN)
    assert int(stopped.name.split("-")[1]) not in (150, 300)
    run_all(launcher, whole, run)
    if launcher in (TORCHRUN, SRUN):
        assert_same_images(whole, run)
    else:
        assert_same_bits(whole / "checkpoint-300", run / "checkpoint-300")
        assert comparable(whole) == comparable(run)


def test_two_ranks_see_what_one_sees(config, tmp_path):
    config = changed(config, train={"max_train_steps": 50, "logging_steps": 1, "checkpointing_steps": 25})
    one, two = train(config), tmp_path / "two"
    run_all(TORCHRUN, one, two)
    assert_same_images(one, two)


@pytest.mark.parametrize(("first", "second"), [(TORCHRUN, PYTHON), (PYTHON, TORCHRUN)], ids=["two-one", "one-two"])
def test_a_run_killed_on_some_ranks_resumes_on_others_with_the_same_images(config, tmp_path, first, second):
    config = changed(config, train={"max_train_steps": 200, "logging_steps": 7, "checkpointing_steps": 20})
    whole, run = train(config), tmp_path / "moved"
    process = begin(command(first, whole, run), run, row=4)  # the first checkpoint stands
    kill(process)
    assert not (run / "pipeline").exists()
    run_all(second, whole, run)
    assert_same_images(whole, run)


def test_two_machines_see_what_one_sees(config, tmp_path):
    """Each has a torchrun of its own, which meet at a port."""
    whole, run = train(config), tmp_path / "machines"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meet = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *meet, SCRIPT]
    machines = [subprocess.Popen(command(launcher, whole, run), start_new_session=True) for _ in range(2)]
    assert [machine.wait(timeout=240) for machine in machines] == [0, 0]
    assert_same_images(whole, run)


def test_ranks_that_do_not_see_the_same_checkpoint_stop_before_any_work(config, tmp_path):
    """As on machines that do not share the run's folder."""
    whole = train(config)
    shutil.copytree(whole, tmp_path / "rank-0")
    before = (tmp_path / "rank-0" / "training_log.csv").read_text()
    each = [options(whole, tmp_path / f"rank-{rank}", "--train.max_train_steps", "12") for rank in range(2)]
    for error in errors_of_ranks(tmp_path, each):
        assert "checkpoint-8 differs on rank 1; train.output_dir must be a folder that every machine" in error
    assert (tmp_path / "rank-0" / "training_log.csv").read_text() == before
    assert not list(tmp_path.glob("rank-1/checkpoint-*"))


def test_a_run_sharded_by_fsdp2_trains_saves_resumes_elsewhere_and_exports(config, tmp_path):
    """With two EMAs and accumulation; killed when sharded, resumed sharded, then on one rank, and back."""
    config = changed(
        config,
        optim={"extra_ema_decays": [0.5]},
        train={"max_train_steps": 240, "logging_steps": 4, "checkpointing_steps": 20}
        | {"gradient_accumulation_steps": 2},
    )
    whole, run = train(config), tmp_path / "sharded"
    process = begin(command(SHARDED, whole, run), run, row=6)
    kill(process)
    assert not (run / "pipeline").exists()
    for launcher, steps in ((SHARDED, 200), (PYTHON, 220), (SHARDED, 240)):
        run_all(launcher, whole, run, "--train.max_train_steps", str(steps))
    assert_same_images(whole, run)
    for name, weights in load_file(whole / "checkpoint-240" / "ema-0.5.safetensors").items():
        torch.testing.assert_close(
            load_file(run / "checkpoint-240" / "ema-0.5.safetensors")[name], weights, atol=1e-4, rtol=0
        )
    exported = DiffusionPipeline.from_pretrained(run / "pipeline").transformer.state_dict()
    ema = load_file(run / "checkpoint-240" / "ema.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in ema.items())


def test_sharded_muon_takes_the_steps_of_one_rank(config, tmp_path):
    config = changed(
        config,
        optim={"optimizer": "muon", "adam_weight_decay": 0.1},
        train={"max_train_steps": 40, "logging_steps": 4, "checkpointing_steps": 20},
    )
    whole, run = train(config), tmp_path / "sharded"
    for launcher, steps in ((SHARDED, 20), (PYTHON, 32), (SHARDED, 40)):
        run_all(launcher, whole, run, "--train.max_train_steps", str(steps))
    assert_same_images(whole, run)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_weight_that_is_not_finite_on_one_rank_ends_all(config, tmp_path, sharded, rank):
    whole = train(changed(config, train={"max_train_steps": 4}))
    errors = errors_of_ranks(tmp_path, [options(whole, tmp_path / "faulty")] * 2, "nan", rank, sharded)
    named = "a weight is not finite at step 3; first not finite: weight transformer_blocks.1.ff.net.2.weight; "
    assert all(error.startswith(named) for error in errors)


@pytest.mark.parametrize(
    "fault", ["locked", "start_log", "append_log", "save_checkpoint", "save_sample_grid", "export"]
)
def test_what_fails_on_the_first_rank_ends_all_with_the_same_sentence(config, tmp_path, fault):
    whole = train(changed(config, train={"max_train_steps": 4}))
    each = options(whole, tmp_path / "faulty", "--train.sampling_steps", "4", "--train.logging_steps", "4")
    sentence = f"train.output_dir {tmp_path / 'faulty'}: No space left on device; make room and call again: what is"
    assert all(error.startswith(sentence) for error in errors_of_ranks(tmp_path, [each] * 2, fault))


def test_ranks_that_torchrun_restarts_recover(config, tmp_path):
    """The first rank is killed; torchrun stops the other, restarts both, and they resume from the last checkpoint."""
    config = changed(config, train={"max_train_steps": 120, "logging_steps": 7, "checkpointing_steps": 20})
    whole, run = train(config), tmp_path / "restarted"
    process = begin(command([*TWO_RANKS, "--max_restarts", "3", SCRIPT], whole, run), run, row=4)
    ranks = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "0"]
    assert len(ranks) == 1
    ranks[0].kill()
    assert process.wait(timeout=240) == 0
    assert_same_images(whole, run)


def test_a_port_that_is_taken_is_one_line(config, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
        run = [*PYTHON, "--data.latents", config.data.latents, "--train.output_dir", str(tmp_path / "run")]
        done = subprocess.run(run, env={**os.environ, **address}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"the ranks cannot meet at 127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT)" in done.stderr
    assert "Traceback" not in done.stderr
