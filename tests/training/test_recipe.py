"""The recipe with what data and machine resolved, which a resumed run must share."""

import pytest
from accelerate.state import AcceleratorState
from training_runs import changed

from dit_hf.latents.prepare import prepare_latents
from dit_hf.recipe_file import read_config
from dit_hf.storage import write_manifest
from dit_hf.training.trainer import train


def test_a_run_does_not_resume_with_another_cache_of_as_many_images(config, vae_folder, tmp_path):
    train(config)
    others = str(tmp_path / "others")
    prepare_latents("avatars", others, str(vae_folder), "16", flip=True, num_images=200, seed=1)
    options = {"max_train_steps": 10, "resume_from_checkpoint": "latest"}
    config = changed(config, data={"latents": others}, train=options)
    with pytest.raises(ValueError, match=r"another recipe: found\.pictures_sha256 was '\w{12}', now '\w{12}'; "):
        train(config)


def test_a_runs_precision_is_the_one_it_was_computed_in(config, monkeypatch):
    """accelerate's file says fp16, and there is no GPU; such a run is resumed by another launcher."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    AcceleratorState._reset_state()
    run = train(config)
    assert read_config(run / "config.yaml").train.mixed_precision == "no"
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    AcceleratorState._reset_state()
    state = run / "checkpoint-8" / "state.json"
    text = state.read_text()
    assert text.count('"mixed_precision": "no"') == 1
    state.write_text(text.replace('"mixed_precision": "no"', '"mixed_precision": "fp16"'))  # as early versions wrote
    write_manifest(run / "checkpoint-8")
    train(changed(config, train={"max_train_steps": 10, "resume_from_checkpoint": "latest"}))
    assert (run / "checkpoint-10").is_dir()
