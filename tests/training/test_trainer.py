import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import assert_same_bits, changed, comparable, half_precision, rows

from dit_hf import LatentDiTTransformer2DModel
from dit_hf.recipe_file import read_config
from dit_hf.runs import read_log
from dit_hf.storage import locked
from dit_hf.training.throughput import Speed
from dit_hf.training.trainer import Trainer, train

ROOT = Path(__file__).parents[2]


def test_training_lowers_the_loss(config):
    config = changed(
        config,
        data={"sample_posterior": False},  # the random VAE's posterior is mostly noise, which nothing can learn
        train={"max_train_steps": 150, "global_batch_size": 16, "logging_steps": 25, "checkpointing_steps": 150},
    )
    log = rows(train(config))
    assert float(log[-1]["loss"]) < 0.8 * float(log[0]["loss"])


def test_resumed_run_ends_with_the_same_bits_and_log(config, tmp_path):
    whole = train(config)
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-8")
    shutil.rmtree(cut / "pipeline")
    with open(cut / "training_log.csv", "a") as file:
        file.write("9,1.0,72,0.1")  # a row cut short
    (cut / ".checkpoint-7.partial").mkdir()  # a checkpoint cut short, of a step that is not saved again
    train(changed(config, train={"output_dir": str(cut), "resume_from_checkpoint": "latest"}))
    assert_same_bits(whole / "checkpoint-8", cut / "checkpoint-8")
    assert comparable(whole) == comparable(cut)
    assert (cut / "pipeline" / "model_index.json").is_file()
    assert not list(cut.glob(".*"))


class RecordsReads(TorchDispatchMode):
    """Records when a value is read on the host, which on a GPU waits for the device."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_between_rows_of_the_log_nothing_waits_for_the_device(config, optimizer, monkeypatch):
    paused, steps = Speed.paused, []
    monkeypatch.setattr(Speed, "paused", lambda speed: steps.append(speed.steps) or paused(speed))
    run = Path(config.train.output_dir)
    trainer = Trainer(changed(config, optim={"optimizer": optimizer}))
    with RecordsReads() as recorder:
        for step in range(3):
            trainer.step(step)
        assert recorder.reads == 0
        trainer.step.window.sum().item()
        assert recorder.reads == 1  # so a read would have been seen
    trainer.fit(run)
    assert len(steps) == 4  # of 8 steps: rows of the log at 3 and 6, checkpoints at 4 and 8


def test_two_processes_do_not_write_one_run(config):
    run = Path(config.train.output_dir)
    with locked(run / ".lock", "run"), pytest.raises(FileExistsError, match="being written by another process"):
        train(config)
    assert not (run / "training_log.csv").exists()
    assert train(config) == run


def test_checkpoints_of_something_else_are_left_alone(config):
    other = Path(config.train.output_dir) / "checkpoint-500" / "model.safetensors"
    other.parent.mkdir(parents=True)
    other.touch()
    for resume, message in ((None, "holds checkpoints of something else; name a new"), ("latest", "no usable checkp")):
        with pytest.raises((FileExistsError, ValueError), match=message):
            train(changed(config, train={"resume_from_checkpoint": resume}))
    assert other.is_file()


def test_a_run_resumed_from_an_earlier_checkpoint_removes_what_came_after_it(config):
    train(changed(config, train={"sampling_steps": 2}))
    back = {"max_train_steps": 6, "resume_from_checkpoint": "checkpoint-4"}
    run = train(changed(config, train=back))
    assert sorted(path.name for path in run.glob("samples/*")) == ["step-2.png", "step-4.png", "step-6.png"]
    assert "samples/step-6.png" in (run / "README.md").read_text()
    # The written recipe does not name the checkpoint: a run of it would go back again.
    assert read_config(run / "config.yaml").train.resume_from_checkpoint is None
    with pytest.raises(FileExistsError, match="holds a run"):
        train(read_config(run / "config.yaml"))


def test_fp16_skips_overflows_settles_on_a_scale_and_learns(config, monkeypatch):
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    config = changed(config, train={"max_train_steps": 30, "logging_steps": 1, "checkpointing_steps": 30})
    trainer = Trainer(config)
    scaler = half_precision(trainer, 2.0**40)
    before = trainer.tensors.ema_weights("ema")
    trainer.step(0)
    assert scaler.get_scale() == 2.0**39
    after = trainer.tensors.ema_weights("ema")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer.step.first_skipped == 0
    assert all(weight.dtype == torch.float32 for weight in trainer.transformer.parameters())
    trainer.step.begin_window()
    trainer.fit(Path(config.train.output_dir))
    log = rows(config.train.output_dir)
    scales = [float(row["loss_scale"]) for row in log]
    assert scales[0] == 2.0**38
    assert min(scales) < 2.0**30
    assert scales[-1] > min(scales)  # it grows again, by its growth interval
    whole = train(changed(config, train={"output_dir": str(Path(config.train.output_dir).parent / "float32")}))
    assert float(log[-1]["loss"]) == pytest.approx(float(rows(whole)[-1]["loss"]), rel=0.2)


def test_fp16_resumes_with_its_scale(config, monkeypatch, tmp_path):
    """The loss scale and when it last grew are part of a checkpoint."""
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    config = changed(config, train={"max_train_steps": 20, "checkpointing_steps": 10, "logging_steps": 3})
    whole = Trainer(config)
    half_precision(whole, 2.0**20)
    whole.fit(tmp_path / "run")
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "run" / "checkpoint-10", tmp_path / "resumed" / "checkpoint-10")
    train_options = {"output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": "latest"}
    resumed = Trainer(changed(config, train=train_options))
    half_precision(resumed, 1.0)
    resumed.fit(tmp_path / "resumed")
    assert_same_bits(tmp_path / "run" / "checkpoint-20", tmp_path / "resumed" / "checkpoint-20")
    assert comparable(tmp_path / "run")[-3:] == comparable(tmp_path / "resumed")[-3:]


def test_the_reference_objective_trains_too(config):
    config = changed(
        config,
        data={"conditions": [], "normalization": "scaling_factor", "sample_posterior": False, "flip": False},
        objective={"prediction_type": "sample", "loss": "l1", "snr_gamma": None, "condition_dropout": 0.0},
        optim={"ema_decay": 0.0},
    )
    run = train(config)
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline")
    assert pipeline.scheduler.config.prediction_type == "sample"
    assert pipeline.transformer.config.conditions is None
    assert pipeline.config.latents_std == pytest.approx([1 / 0.18215] * 4)


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        (
            {"train": {"gradient_accumulation_steps": 3}},
            ValueError,
            "must be divisible by .*, 1 x 3",
        ),
        ({"model": {"patch_size": 3}}, ValueError, "not divisible by patch_size 3"),
        ({"model": {"preset": "huge"}}, ValueError, "the presets are tiny, reference, S/2"),
        ({"data": {"conditions": ["Tall"]}}, ValueError, "no condition Tall"),
        ({"data": {"latents": "nowhere"}}, ValueError, "not a latent cache"),
        ({"train": {"logging_steps": 0}}, ValueError, "train.logging_steps=0 must be at least 1"),
        ({"objective": {"condition_dropout": 0.7}}, ValueError, "condition_dropout=0.7 must be between 0 and 0.5"),
        ({"objective": {"condition_dropout": 0.0}}, ValueError, "condition_dropout=0 never learns"),
        ({"train": {"seed": -1}}, ValueError, "train.seed=-1 must be between 0"),
        ({"objective": {"snr_gamma": 0.0}}, ValueError, "snr_gamma=0 must be above 0"),
        ({"train": {"num_inference_steps": 501}}, ValueError, "num_inference_steps"),
        ({"optim": {"max_grad_norm": -1.0}}, ValueError, "max_grad_norm=-1 must be at least 0"),
        ({"model": {"attention_head_dim": 7}}, ValueError, "the width 14 .* is not divisible by 4"),
        ({"optim": {"extra_ema_decays": [0.9, 1.5]}}, ValueError, "extra_ema_decays=1.5 must be between 0 and 1"),
    ],
)
def test_impossible_recipes_are_refused_before_any_work(config, sections, error, message):
    with pytest.raises(error, match=message):
        train(changed(config, **sections))
    assert not Path(config.train.output_dir).exists()


def test_another_run_or_recipe_is_not_overwritten(config):
    run = train(config)
    log = (run / "training_log.csv").read_text()
    with pytest.raises(FileExistsError, match="holds a run"):
        train(config)
    with pytest.raises(FileExistsError, match="holds a run"):  # as from a script whose variable is empty
        train(changed(config, train={"resume_from_checkpoint": ""}))
    with pytest.raises(ValueError, match=r"optim\.learning_rate was 0\.001, now 0\.002"):
        train(changed(config, optim={"learning_rate": 2e-3}, train={"resume_from_checkpoint": "latest"}))
    assert (run / "training_log.csv").read_text() == log


def test_a_disk_that_fills_up_while_saving_costs_only_what_came_after_the_last_checkpoint(config, tmp_path):
    whole = train(config)
    config = changed(config, train={"output_dir": str(tmp_path / "full"), "resume_from_checkpoint": "latest"})
    run = train(changed(config, train={"max_train_steps": 4}))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"full: .*; make room and call again: what is finished is kept"):
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]
    train(config)
    assert_same_bits(whole / "checkpoint-8", run / "checkpoint-8")
    assert comparable(whole) == comparable(run)


def test_levels_without_a_timestep_are_empty_in_the_log_and_null_in_json(config):
    """Five timesteps leave every other tenth of the schedule without one."""
    run = train(changed(config, objective={"num_train_timesteps": 5}, train={"num_inference_steps": 2}))
    last = read_log(run)[-1]
    assert [bool(last[f"validation_loss_level_{level}"]) for level in range(10)] == [True, False] * 5
    best = json.loads((run / "best.json").read_text(), parse_constant=pytest.fail)
    assert best["checkpoints"][0]["validation_loss_by_noise_level"][1::2] == [None] * 5


def test_a_warmup_that_is_longer_than_the_run_is_reported(config, capsys):
    train(changed(config, optim={"lr_warmup_steps": 100}))
    assert "after its 8 steps the learning rate has reached 8.0% of optim.learning_rate" in capsys.readouterr().out


def test_a_full_gpu_is_reported_in_one_line(config, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(LatentDiTTransformer2DModel, "forward", full)
    with pytest.raises(OSError, match=r"the GPU's memory is full; a larger train\.gradient_accumulation_steps"):
        train(changed(config, train={"validation_images": 0}))


def test_deterministic_kernels_change_nothing_on_a_cpu(config, tmp_path):
    whole = train(config)
    try:
        run = train(changed(config, train={"output_dir": str(tmp_path / "deterministic"), "deterministic": True}))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(whole / "checkpoint-8", run / "checkpoint-8")
