import importlib.metadata
import importlib.util

import pytest
import torch
import wandb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from training_runs import changed

from dit_hf.config import PRESETS
from dit_hf.models.transformer_latent_dit import LatentDiTTransformer2DModel
from dit_hf.runs import read_log
from dit_hf.training.log import COLUMNS, append_log, plot_loss_curve, start_log
from dit_hf.training.throughput import flops_per_image, peak_flops
from dit_hf.training.trackers import choose_tracker
from dit_hf.training.trainer import train


def row(step):
    return {**dict.fromkeys(COLUMNS), "step": step, "loss": 1 / step}


def test_log_is_cut_back_to_where_the_run_resumes(tmp_path):
    start_log(tmp_path, 0)
    for step in (10, 20, 30):
        append_log(tmp_path, row(step))
    with open(tmp_path / "training_log.csv", "a") as file:
        file.write("40,1.0,3")  # cut short by a kill
    assert [r["step"] for r in read_log(tmp_path)] == ["10", "20", "30"]
    start_log(tmp_path, 20)
    append_log(tmp_path, row(21))
    assert [r["step"] for r in read_log(tmp_path)] == ["10", "20", "21"]
    plot_loss_curve(tmp_path)
    Image.open(tmp_path / "loss_curve.png").verify()


def test_a_log_keeps_columns_that_are_no_longer_measured(tmp_path):
    start_log(tmp_path, 0, [*COLUMNS, "FD-a-2k"])
    append_log(tmp_path, row(10) | {"FD-a-2k": 5.0})
    start_log(tmp_path, 10, [*COLUMNS, "FD-b-1k"])
    append_log(tmp_path, row(20) | {"FD-b-1k": 7.0})
    assert [(r["FD-a-2k"], r["FD-b-1k"]) for r in read_log(tmp_path)] == [("5.0", ""), ("", "7.0")]


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


@pytest.mark.parametrize(("preset", "size"), [("tiny", 16), ("reference", 32), ("B/2", (32, 16))])
def test_flops_are_those_that_torch_counts(preset, size):
    """Except for the modulation, which is computed once an image and not once a token."""
    with torch.device("meta"):
        model = LatentDiTTransformer2DModel(sample_size=size, **PRESETS[preset])
    height, width = (size, size) if isinstance(size, int) else size
    noisy = torch.empty((8, 4, height, width), device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(noisy, torch.zeros(8, device="meta")).sample.sum().backward()
    counted = counter.get_flop_counts()
    blocks = sum(
        sum(counted[f"LatentDiTTransformer2DModel.transformer_blocks.{i}.{part}"].values())
        for i in range(len(model.transformer_blocks))
        for part in ("attn", "ff")
    )
    assert flops_per_image(model.config) * 8 == pytest.approx(blocks, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_gpus_peak_is_known_by_its_name_and_by_no_part_of_a_word(name, tflops):
    assert peak_flops(name) == (tflops and tflops * 1e12)
