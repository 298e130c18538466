"""MODEL: a run's folder, a checkpoint or a pipeline's folder; and the files of a run."""

import json
import resource
import shutil
import tempfile

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from training_runs import changed

from dit_hf.latents.vae import weights_sha256
from dit_hf.runs import find_run, load_pipeline
from dit_hf.sampling.generate import generate_images
from dit_hf.training.trainer import Trainer, train
from dit_hf_cli import main


@pytest.mark.parametrize("last_step", [8, 9], ids=["before-its-next-checkpoint", "after-it"])
def test_a_run_trained_for_more_steps_is_not_a_model_from_its_next_checkpoint_to_its_end(config, last_step):
    run = train(config)
    longer = {"max_train_steps": 12, "checkpointing_steps": 3, "resume_from_checkpoint": "latest"}
    trainer = Trainer(changed(config, train=longer))
    original = trainer.step.accumulate

    def fail(step):
        if step == last_step:
            raise OSError("the machine burns")
        return original(step)

    trainer.step.accumulate = fail
    with pytest.raises(OSError, match="burns"):
        trainer.fit(run)
    assert (run / "checkpoint-9").is_dir() == (last_step == 9)
    if last_step == 8:
        load_pipeline(str(run))
    else:
        with pytest.raises(ValueError, match="the run is not finished; name one of its checkpoints"):
            load_pipeline(str(run))
    assert load_pipeline(str(run / "pipeline")).config.guidance_scale == 2.0


def test_a_pipeline_by_its_folder_and_by_its_runs(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "run" / "pipeline")
    for name in ("run", "run/pipeline"):
        assert load_pipeline(str(tmp_path / name)).config.guidance_scale == 2.0
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load_pipeline(str(tmp_path / "nowhere"))
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="is a file; a model is the folder of a run"):
        load_pipeline(str(tmp_path / "x.png"))


def test_a_checkpoint_is_a_model_too(config):
    run = train(config)
    last, earlier = load_pipeline(f"{run}/checkpoint-8", "cpu"), load_pipeline(f"{run}/checkpoint-4", "cpu")
    exported = load_pipeline(str(run), "cpu")
    images = [
        generate_images(pipeline, [0], [{"Smiling": 1}], 0, num_inference_steps=2) for pipeline in (last, exported)
    ]
    assert np.array_equal(*images)
    for name in ("guidance_scale", "condition_labels", "latents_mean", "latents_std"):
        assert last.config[name] == exported.config[name]
    assert weights_sha256(earlier.transformer) != weights_sha256(last.transformer)
    assert load_pipeline(f"{run}/checkpoint-4", "cpu", dtype=torch.bfloat16, vae=None).dtype == torch.bfloat16
    # Without its export the run is not a model, and the error names those that are.
    shutil.rmtree(run / "pipeline")
    with pytest.raises(ValueError, match=rf"the run is not finished; name one of its checkpoints \({run}/checkpoint-"):
        load_pipeline(str(run))
    weights = run / "checkpoint-4" / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="checkpoint-4 is damaged"):
        load_pipeline(f"{run}/checkpoint-4")


def test_a_run_is_found_by_its_folder_its_pipeline_and_its_checkpoints(tmp_path, monkeypatch):
    run = tmp_path / "run"
    for folder in (run / "pipeline", run / "checkpoint-8", tmp_path / "other" / "pipeline"):
        folder.mkdir(parents=True)
    for name in ("config.yaml", "training_log.csv"):
        (run / name).touch()
    (tmp_path / "other" / "config.yaml").touch()  # which other tools write, too
    for model in (run, run / "pipeline", run / "checkpoint-8"):
        assert find_run(str(model)) == run
    for model in (tmp_path, tmp_path / "other", tmp_path / "other" / "pipeline", "you/faces"):
        assert find_run(str(model)) is None
    monkeypatch.chdir(run)
    assert find_run("pipeline").samefile(run)


def test_a_temporary_folder_without_room_is_named(config, monkeypatch, tmp_path):
    run = train(config)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # for which a file is too large as a full disk is
    try:
        with pytest.raises(OSError, match=rf"the temporary folder {tmp_path} \(TMPDIR\): File too large; make room"):
            load_pipeline(f"{run}/checkpoint-8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def revisions(hub, tmp_path):
    """Two models as revisions of a repository, `main` and `v2`, and the hash of the weights of each."""
    hashes = {}
    for difference, revision in enumerate(("main", "v2")):
        pipeline = tiny_pipeline()
        with torch.no_grad():
            next(pipeline.transformer.parameters()).add_(difference)
        pipeline.save_pretrained(tmp_path / revision)
        files = {path: path.read_bytes() for path in (tmp_path / revision).rglob("*") if path.is_file()}
        key = "you/demo" if revision == "main" else f"you/demo@{revision}"
        hub.repositories[key] = {path.relative_to(tmp_path / revision).as_posix(): files[path] for path in files}
        hashes[revision] = weights_sha256(pipeline.transformer)
    assert hashes["main"] != hashes["v2"]
    return hashes


def test_a_model_on_the_hub_may_be_a_revision(hub, revisions):
    hub.repositories["you/demo@refs/pr/1"] = hub.repositories["you/demo@v2"]
    commit = hub.commit("you/demo@v2")
    for revision, content in ((None, "main"), ("v2", "v2"), ("refs/pr/1", "v2"), (commit, "v2"), ("main", "main")):
        name = f"you/demo@{revision}" if revision else "you/demo"
        assert weights_sha256(load_pipeline(name, "cpu").transformer) == revisions[content]
    with pytest.raises(ValueError, match="you/demo@v3: you/demo has no branch, tag or commit v3 on the Hub"):
        load_pipeline("you/demo@v3")


def test_commands_take_a_revision_and_write_it_down(hub, revisions, tmp_path):
    few = ["--num_images", "1", "--num_inference_steps", "1"]
    assert main(["sample", "you/demo@v2", "--output_dir", str(tmp_path / "images"), *few]) == 0
    assert json.loads(Image.open(tmp_path / "images" / "00000.png").text["dit_hf"])["model"] == "you/demo@v2"
    assert main(["push", "you/demo@v2", "you/other"]) == 0
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert hub.repositories["you/other"][weights] == hub.repositories["you/demo@v2"][weights]


MISSING = "no such model on the Hub, or a private one: check the name, or log in by `hf auth login`"


@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        (403, "GatedRepo", "gated on the Hub: ask for access at {endpoint}/you/real, and log in by `hf auth login`"),
        (
            401,
            "RepoNotFound",
            MISSING,
        ),
        (
            404,
            "RepoNotFound",
            MISSING,
        ),
        (0, "", "not on this machine, and the Hub cannot be reached (Server disconnected without sending a response)"),
    ],
)
def test_why_a_model_cannot_be_loaded_is_one_line(hub, tmp_path, capfd, status, code, line):
    if status:
        hub.denied["you/real"] = (status, code)
    else:
        hub.broken = {"*"}
    assert main(["sample", "you/real", "--output_dir", str(tmp_path / "images")]) == 1
    captured = capfd.readouterr()
    assert captured.err == f"dit-hf sample: error: you/real: {line.format(endpoint=hub.endpoint)}\n"
    assert captured.out == ""


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_weights_that_lack_one_are_refused(part, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    path = tmp_path / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    missing = sorted(weights)[0]
    del weights[missing]
    save_file(weights, path)
    with pytest.raises(ValueError, match=f"{tmp_path}: .*its weights lack {missing}; config.json and weights"):
        load_pipeline(str(tmp_path))
