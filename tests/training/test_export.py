"""The results of a finished run: its pipeline, sample grid, loss curve and card."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from training_runs import changed, rows

from dit_hf import LatentDiTTransformer2DModel
from dit_hf.training.trainer import Trainer, train


def test_a_finished_run_has_all_its_files(config):
    run = train(config)
    assert [row["step"] for row in rows(run)] == ["3", "4", "6", "8"]
    assert float(rows(run)[-1]["epoch"]) == pytest.approx(64 / len(Trainer(config).reader), abs=1e-4)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    for name in ("samples/step-8.png", "loss_curve.png"):
        Image.open(run / name).verify()
    card = (run / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "{{" not in card
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline")
    ema = load_file(run / "checkpoint-8" / "ema.safetensors")
    assert all(torch.equal(value, ema[name]) for name, value in pipeline.transformer.state_dict().items())
    assert pipeline.config.guidance_scale == 2.0
    assert pipeline({"Smiling": True}, num_inference_steps=2).images[0].size == (16, 16)
    assert not list(run.glob(".*"))


def test_a_run_trained_from_scratch_in_the_same_folder_exports_its_own_weights(config):
    run = train(config)
    for name in ("checkpoint-4", "checkpoint-8"):
        shutil.rmtree(run / name)
    train(changed(config, optim={"learning_rate": 5e-3}, train={"resume_from_checkpoint": "latest"}))
    ema = load_file(run / "checkpoint-8" / "ema.safetensors")
    transformer = DiffusionPipeline.from_pretrained(run / "pipeline").transformer
    assert all(torch.equal(value, ema[name]) for name, value in transformer.state_dict().items())
    assert "learning_rate: 0.005" in (run / "README.md").read_text()


def test_latest_without_a_checkpoint_starts_and_on_a_finished_run_completes_the_export(config):
    config = changed(config, train={"resume_from_checkpoint": "latest"})
    run = train(config)
    log = (run / "training_log.csv").read_text()
    shutil.rmtree(run / "pipeline")
    (run / "loss_curve.png").unlink()
    best = (run / "best.json").read_text()
    (run / "best.json").unlink()
    train(config)
    assert (run / "pipeline" / "model_index.json").is_file()
    assert (run / "best.json").read_text() == best
    assert (run / "loss_curve.png").is_file()
    assert (run / "training_log.csv").read_text() == log


def test_a_run_with_more_steps_exports_again_and_one_with_fewer_is_refused(config):
    train(config)
    longer = changed(config, train={"max_train_steps": 10, "resume_from_checkpoint": "latest"})
    run = train(longer)
    assert "| steps | 10 |" in (run / "README.md").read_text()
    ema = load_file(run / "checkpoint-10" / "ema.safetensors")
    transformer = DiffusionPipeline.from_pretrained(run / "pipeline").transformer
    assert all(torch.equal(value, ema[name]) for name, value in transformer.state_dict().items())
    with pytest.raises(ValueError, match="already beyond"):
        train(changed(config, train={"resume_from_checkpoint": "latest"}))
    assert "max_train_steps: 10" in (run / "config.yaml").read_text()


def test_a_finished_run_exports_its_pipeline_with_another_guidance(config):
    train(config)
    options = {"guidance_scale": 4.5, "resume_from_checkpoint": "latest"}
    run = train(changed(config, train=options))
    assert DiffusionPipeline.from_pretrained(run / "pipeline").config.guidance_scale == 4.5


def test_several_emas_are_saved_validated_and_exported(config):
    config = changed(config, optim={"ema_decay": 0.9, "extra_ema_decays": [0.2]})
    run = train(config)
    assert float(rows(run)[-1]["validation_loss-0.2"]) != float(rows(run)[-1]["validation_loss"])
    exported = LatentDiTTransformer2DModel.from_pretrained(run / "ema-0.2").state_dict()
    saved = load_file(run / "checkpoint-8" / "ema-0.2.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in saved.items())


def test_no_file_that_is_shared_names_a_folder_of_this_machine(config):
    run = train(config)
    for path in [run / "README.md", *(run / "pipeline").rglob("*.json"), *Path(config.data.latents).rglob("*.json")]:
        if path.name != "latents.json":  # which holds where the cache came from
            assert str(run.parents[1]) not in path.read_text(), path
