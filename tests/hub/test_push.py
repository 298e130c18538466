"""`dit-hf push`, to a folder and to a small Hub of our own, and loading what it wrote in other processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import small_disk, tiny_pipeline
from huggingface_hub import ModelCard
from local_hub import running_hub
from repositories import HIDE_DIT_HF, assert_no_leaks, push, read_snippets
from safetensors import safe_open
from training_runs import changed

from dit_hf.hub.push import without_paths
from dit_hf.latents.vae import weights_sha256
from dit_hf.recipe_file import read_config
from dit_hf.runs import load_pipeline
from dit_hf.storage import locked_beside
from dit_hf.training.trainer import train
from dit_hf_cli import main

SETTINGS = {"num_inference_steps": 2, "output_type": "np"}


@pytest.fixture
def run(config):
    """A finished run of 8 steps."""
    return train(config)


@pytest.fixture
def folder(tmp_path):
    """A pipeline that fits diffusers' own, too."""
    tiny_pipeline(rotary=False).save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def test_a_run_becomes_a_repository_without_its_optimizer(run, tmp_path, capsys):
    code, line = push(capsys, run, "--output_dir", tmp_path / "out")
    assert (code, line) == (0, f"{tmp_path / 'out'} holds the repository")
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {
        *("README.md", "samples.png", "loss_curve.png", "training_log.csv", "config.yaml", "export.json"),
        *(
            "model_index.json",
            "modular_config.json",
            "pipeline.py",
            "scheduler/scheduler_config.json",
            "transformer/config.json",
        ),
        *("transformer/diffusion_pytorch_model.safetensors", "vae/config.json"),
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert_no_leaks(tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "out" / "config.yaml").read_text()
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["data"]["latents"] == "latents"
    code, line = push(capsys, run, "--output_dir", tmp_path / "out")
    assert code == 1
    assert "is not empty; name a new folder, or give --overwrite true" in line
    assert push(capsys, run, "--output_dir", tmp_path / "out", "--overwrite")[0] == 0


def test_a_pushed_run_is_a_pipeline_like_any_other(run, tmp_path, capsys):
    assert push(capsys, run, "--output_dir", tmp_path / "out")[0] == 0
    pushed, own = load_pipeline(str(tmp_path / "out"), "cpu"), load_pipeline(str(run), "cpu")
    assert weights_sha256(pushed.transformer) == weights_sha256(own.transformer)
    assert push(capsys, tmp_path / "out", "--output_dir", tmp_path / "again")[0] == 0
    cards = [ModelCard.load(tmp_path / name / "README.md", ignore_metadata_errors=False) for name in ("out", "again")]
    assert [card.data.license for card in cards] == ["apache-2.0"] * 2
    assert "| images seen | 64 |" in cards[1].text


def test_a_model_of_unknown_data_needs_a_license(folder, tmp_path, capsys):
    for number, options in enumerate([(), ("--license", "mit")]):
        assert main(["push", str(folder), "--output_dir", str(tmp_path / str(number)), *options]) == 0
        reminded = "the training data is unknown: name its terms by --license" in capsys.readouterr().out
        assert reminded == (not options)


def test_a_folder_with_other_content_is_never_replaced(folder, tmp_path, capsys):
    (tmp_path / "out" / ".git").mkdir(parents=True)
    code, line = push(capsys, folder, "--output_dir", tmp_path / "out", "--overwrite")
    assert code == 1
    assert "holds .git, which no push has written; name a new folder" in line
    assert (tmp_path / "out" / ".git").is_dir()


def test_a_pushed_checkpoint_is_described_as_a_checkpoint(run, tmp_path, capsys):
    assert push(capsys, run / "checkpoint-4", "--output_dir", tmp_path / "out")[0] == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| steps | 4 of 8 |" in text
    assert "| images seen | 32 |" in text
    validation = json.loads((run / "checkpoint-4" / "state.json").read_text())["validation_loss"]
    assert f"| validation loss of these weights | {validation:.4f} " in text
    assert not (tmp_path / "out" / "training_log.csv").exists()
    assert (tmp_path / "out" / "samples.png").is_file()
    assert_no_leaks(tmp_path / "out")
    pushed, own = load_pipeline(str(tmp_path / "out"), "cpu"), load_pipeline(str(run / "checkpoint-4"), "cpu")
    assert weights_sha256(pushed.transformer) == weights_sha256(own.transformer)


def test_names_of_folders_stay_here_for_relative_paths_too(training_latents, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("A customer/project")
    folder.mkdir(parents=True)
    (folder / "latents").symlink_to(training_latents)
    where = {"output_dir": str(folder / "run"), "max_train_steps": 4}
    train(changed(config, data={"latents": str(folder / "latents")}, train=where))
    for number, model in enumerate((folder / "run", folder / "run" / "checkpoint-4")):
        assert main(["push", str(model), "--output_dir", f"out-{number}"]) == 0
        for path in Path(f"out-{number}").rglob("*"):
            assert path.is_dir() or b"customer" not in path.read_bytes(), path
    assert read_config(Path("out-0/config.yaml")).data.latents == "latents"


def test_reports_are_shared_without_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/mine").mkdir(parents=True)
    kept = [
        "facebook/dinov2-large",
        "you/faces@refs/pr/1",
        "S/2",
        "https://a.b/c/d/e",
        "(x - 127) / 128, mean / std / n",
        "no",
    ]
    assert without_paths(kept) == kept
    assert without_paths({"a": "runs/mine", "b": "a/b/c d", "c": ["./x"]}) == {"a": "mine", "b": "c d", "c": ["x"]}
    report = {"a": ["/home/me/x", "b/c", 1], "d": "../up", "e": "~/f"}
    assert without_paths(report) == {"a": ["x", "b/c", 1], "d": "up", "e": "f"}


def test_a_damaged_report_is_named_by_its_place_in_the_run(run, tmp_path, capsys):
    report = run / "evaluation" / "evaluation.json"
    report.parent.mkdir()
    report.write_text("{}")
    assert main(["push", str(run), "--output_dir", str(tmp_path / "out")]) == 1
    assert f"error: {report} is damaged" in capsys.readouterr().err


def test_a_link_out_of_a_run_is_not_shared(run, tmp_path, capsys):
    (tmp_path / "token").write_text("secret")
    (run / "training_log.csv").rename(tmp_path / "log.csv")
    (run / "training_log.csv").symlink_to(tmp_path / "token")
    assert main(["push", str(run), "--output_dir", str(tmp_path / "out")]) == 1
    assert f"training_log.csv is a link that leads out of {run}; put the file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_large_weights_are_sharded(folder, tmp_path, capsys):
    assert push(capsys, folder, "--output_dir", tmp_path / "out", "--max_shard_size", "60KB")[0] == 0
    assert len(list((tmp_path / "out" / "transformer").glob("*-of-*.safetensors"))) > 1
    again, before = load_pipeline(str(tmp_path / "out"), "cpu"), load_pipeline(str(folder), "cpu")
    options = {**SETTINGS, "batch_size": 2}
    images = [p(generator=torch.Generator().manual_seed(0), **options).images for p in (again, before)]
    assert np.array_equal(*images)


def test_what_is_to_be_private_is_not_pushed_where_everyone_can_read_it(hub, folder, capsys):
    """The Hub makes new repositories private alone, and ignores the wish for others."""
    assert push(capsys, folder, "you/faces")[0] == 0
    before = dict(hub.repositories["you/faces"])
    code, error = push(capsys, folder, "you/faces", "--private", "--license", "mit")
    assert (code, hub.repositories["you/faces"]) == (1, before)
    assert "you/faces is public; make it private there, or allow it by --private false" in error
    assert push(capsys, folder, "you/faces", "--private", "false", "--license", "mit")[0] == 0


def test_options_of_the_repository(hub, folder, capsys):
    assert push(capsys, folder, "you/faces", "--private")[0] == 0
    assert hub.private["you/faces"] is True
    before = dict(hub.repositories["you/faces"])
    assert push(capsys, folder, "you/faces", "--revision", "new", "--license", "mit", "--datasets", "[a/b]")[0] == 0
    assert hub.repositories["you/faces"] == before
    card = ModelCard(hub.repositories["you/faces@new"]["README.md"].decode(), ignore_metadata_errors=False)
    assert (card.data.license, card.data.datasets) == ("mit", ["a/b"])
    assert card.text.count('revision="new"') == 4  # modular pipelines need it for their parts, too


def test_impossible_options_are_refused_in_one_line(hub, folder, capsys):
    code, line = push(capsys, folder)
    assert code == 1
    assert "where to?" in line
    code, line = push(capsys, folder, "you/faces", "--attributes", '{"Smiling": true}')
    assert code == 1
    assert "--attributes is for --builtin" in line
    assert hub.repositories == {}


def test_other_content_is_not_overwritten_by_default(hub, folder, tmp_path, capsys):
    hub.repositories["you/notes"] = {"README.md": b"mine", "transformer/config.json": b"{}"}
    code, line = push(capsys, folder, "you/notes")
    assert code == 1
    assert "you/notes holds something else already" in line
    assert hub.repositories["you/notes"] == {"README.md": b"mine", "transformer/config.json": b"{}"}
    # A push of the same model replaces all of the earlier one; another model is refused.
    assert push(capsys, folder, "you/faces", "--max_shard_size", "60KB")[0] == 0
    assert push(capsys, folder, "you/faces")[0] == 0
    assert not any("-of-" in name for name in hub.repositories["you/faces"])
    before = dict(hub.repositories["you/faces"])
    row = ["--builtin", "--attributes", '{"Smiling": true}']
    code, line = push(capsys, folder, "you/faces", *row)
    assert code == 1
    assert "you/faces holds another model already; name another repository or another --revision" in line
    assert hub.repositories["you/faces"] == before
    assert push(capsys, folder, "you/faces", *row, "--overwrite")[0] == 0
    assert json.loads(hub.repositories["you/faces"]["model_index.json"])["_class_name"] == "DiTPipeline"


def test_a_full_disk_is_one_line(folder, tmp_path, capsys):
    with small_disk(50_000):
        code, line = push(capsys, folder, "--output_dir", tmp_path / "out")
    assert code == 1
    assert line.startswith(f"dit-hf push: error: {tmp_path / 'out'}: File too large; make room")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_pushed_by_one_process_loaded_by_three_others_with_the_same_pixels(run, tmp_path):
    """With dit_hf, without it, and as diffusers' own pipeline, each by running a snippet of the card unchanged."""
    row = {"Male": True}
    with running_hub() as hub:
        environment = {**os.environ, **hub.environment()}

        def python(code, cwd):
            cwd.mkdir(exist_ok=True)
            here = environment | {"HF_HOME": str(cwd / "cache")}
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, env=here, cwd=cwd, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr

        def push_each(cwd, *pushes):
            commands = [["push", *map(str, arguments)] for arguments in pushes]
            python(f"from dit_hf_cli import main; assert [main(each) for each in {commands}] == [0, 0]", cwd)

        builtin = ["--builtin", "--attributes", json.dumps(row)]
        push_each(tmp_path / "push", [run, "you/faces"], [run, "you/own", *builtin])
        cards = {name: files["README.md"].decode() for name, files in hub.repositories.items()}
        # A push of the pushed model keeps the summary of its run, if the repository has one.
        pushed = hub.repositories["you/faces"]
        hub.repositories["you/bare"] = {path: pushed[path] for path in pushed if path != "export.json"}
        again = {name: tmp_path / "on" / name for name in ("faces", "bare")}
        push_each(tmp_path / "on", *([f"you/{name}", "--output_dir", folder] for name, folder in again.items()))
        for name, license in (("faces", "apache-2.0"), ("bare", "unknown")):
            card = ModelCard.load(again[name] / "README.md", ignore_metadata_errors=False)
            assert card.data.license == license
            assert ("| images seen | 64 |" in card.text) == (name == "faces")
        # Each snippet, and then the pixels of its pipeline.
        generate = "options = {'num_inference_steps': 4, 'guidance_scale': 2.0, 'output_type': 'np'}\n"
        generate += "import numpy, torch; pipe.set_progress_bar_config(disable=True)\n"
        generate += "images = pipe(REQUESTED, generator=torch.Generator().manual_seed(0), **options).images\n"
        generate += "numpy.save('pixels.npy', images)\n"
        plain, remote, modular = read_snippets(cards["you/faces"])
        (own,) = read_snippets(cards["you/own"])
        python(plain + generate.replace("REQUESTED", str(row)), tmp_path / "with")
        # The modular pipeline reads the image that the other one has written.
        remote += generate.replace("REQUESTED", str(row))
        python(HIDE_DIT_HF + remote + modular, tmp_path / "without")
        python(HIDE_DIT_HF + own + generate.replace("REQUESTED", "[0]"), tmp_path / "own")
    for name in ("with", "without", "own"):
        assert (tmp_path / name / "image.png").is_file()
    pipeline, generator = load_pipeline(str(run), "cpu"), torch.Generator().manual_seed(0)
    expected = pipeline(row, generator=generator, num_inference_steps=4, guidance_scale=2.0, output_type="np").images
    assert np.array_equal(np.load(tmp_path / "with" / "pixels.npy"), expected)
    assert np.array_equal(np.load(tmp_path / "without" / "pixels.npy"), expected)
    difference = np.abs(np.load(tmp_path / "own" / "pixels.npy") - expected).max()
    assert difference < 0.05
    for files in hub.repositories.values():
        for name, content in files.items():
            assert str(tmp_path).encode() not in content, name
            assert b"hf_test" not in content, name
            if name.endswith(".safetensors"):
                (tmp_path / "weights").write_bytes(content)
                with safe_open(tmp_path / "weights", "pt") as weights:
                    assert weights.metadata() == {"format": "pt"}
    shutil.rmtree(tmp_path)


def test_two_pushes_do_not_write_one_folder(folder, tmp_path, capsys):
    with locked_beside(tmp_path / "out"):
        for verb, source in (("push", folder), ("convert", "facebook/DiT-XL-2-256")):
            assert main([verb, str(source), "--output_dir", str(tmp_path / "out")]) == 1
            assert "out is being written by another process; wait for it" in capsys.readouterr().err
    assert main(["push", str(folder), "--output_dir", str(tmp_path / "out")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "out"}


def test_a_push_goes_to_a_pull_request_that_is_there(hub, folder, capsys):
    hub.repositories["you/demo"] = {".gitattributes": b""}
    code, line = push(capsys, folder, "you/demo", "--revision", "refs/pr/1")
    assert code == 1
    assert "you/demo has no revision refs/pr/1; dit-hf push --create_pr true opens a pull request" in line
    hub.repositories["you/demo@refs/pr/1"] = {".gitattributes": b""}
    assert push(capsys, folder, "you/demo", "--revision", "refs/pr/1")[0] == 0
    files = hub.repositories["you/demo@refs/pr/1"]
    assert "model_index.json" in files
    assert b"refs/pr" not in files["README.md"]  # the card is read in main, once it is merged
    assert hub.repositories["you/demo"] == {".gitattributes": b""}
    assert "/branch/" not in "".join(hub.requests)


def test_create_pr_opens_a_pull_request(hub, folder, capsys):
    hub.repositories["you/demo"] = {".gitattributes": b""}
    for options in (["--revision", "v2"], ["--space"]):
        code, line = push(capsys, folder, "you/demo", "--create_pr", *options)
        assert code == 1
        assert "--create_pr" in line
    code, line = push(capsys, folder, "you/demo", "--create_pr")
    assert (code, line) == (0, f"{folder} is now {hub.endpoint}/you/demo/discussions/1")
    assert hub.repositories["you/demo"] == {".gitattributes": b""}
    assert "model_index.json" in hub.repositories["you/demo@refs/pr/1"]
