"""The recipe with what data and machine resolved, which a resumed run must share."""

import pytest
from accelerate.state import AcceleratorState
from training_runs import changed

from dit_hf.latents.cache import open_latents
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


def test_a_run_does_not_resume_on_a_cache_that_has_grown(config, training_latents, vae_folder, tmp_path):
    run = train(config)
    options = {"flip": True, "num_images": 210}
    grown = str(tmp_path / "grown")
    prepare_latents("avatars", grown, str(vae_folder), "16", add_to=str(training_latents), **options)
    more = str(tmp_path / "more")
    prepare_latents("avatars", more, str(vae_folder), "16", add_to=grown, **{**options, "num_images": 215})
    for cache, count in ((grown, 10), (more, 15)):
        resumed = {"max_train_steps": 10, "resume_from_checkpoint": "latest"}
        message = (
            rf"{cache} has grown since {run}/checkpoint-8, from \d+ to \d+ training images, and the order .* resume "
            rf"with the cache before, or start from this model: --model\.init_from {run}/checkpoint-8 and a new --"
        )
        with pytest.raises(ValueError, match=message):
            train(changed(config, data={"latents": cache}, train=resumed))
        assert len(open_latents(cache)[0]) == 200 + count
    # The way out.
    own = {"output_dir": str(tmp_path / "new"), "max_train_steps": 2}
    train(changed(config, data={"latents": more}, train=own, model={"init_from": str(run / "checkpoint-8")}))


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
