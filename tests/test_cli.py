"""The command line: help, errors in one line with exit codes, and whole commands."""

import os
import subprocess
import sys

import pytest
import torch
import yaml

from dit_hf.cli import main


def run(capsys, *args):
    try:
        code = main(list(args))
    except SystemExit as exit_:
        code = exit_.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["trian"], 2, "did you mean 'train'"),
        (["prepare-latents", "--sorce", "x"], 2, "did you mean 'source'"),
        (["prepare-latents", "--output_dir", "x", "--num_images", "many"], 2, "num_images"),
        (["train", "--config", "recipes/avatars.yaml", "--train.max_train_step", "3"], 2, "max_train_steps"),
        (["train", "--config", "recipes/avatars.yaml", "--optim.learning_rate", "fast"], 2, "optim.learning_rate"),
        (["train", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["train", "--data.latents", "nowhere"], 1, "not a latent cache"),
        (["prepare-latents", "--source", "nowhere", "--vae", "avatar", "--output_dir", "x"], 1, "no such folder"),
        (["demo", "--minutes", "-1"], 1, "minutes=-1"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, monkeypatch, args, code, message):
    monkeypatch.chdir(tmp_path)
    got, _, err = run(capsys, *args)
    lines = [line for line in err.splitlines() if "error" in line]
    assert got == code
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err
    assert not any(tmp_path.iterdir())


def test_an_unknown_key_in_a_recipe_names_the_nearest(capsys, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optim:\n  learning_rat: 0.1\n")
    code, _, err = run(capsys, "train", "--config", str(recipe))
    assert code == 2
    assert "learning_rate" in err.splitlines()[-1]


def test_print_config_shows_the_whole_recipe(capsys):
    code, out, _ = run(capsys, "train", "--config", "recipes/avatars.yaml", "--print_config")
    assert code == 0
    recipe = yaml.safe_load(out)
    assert recipe["objective"]["snr_gamma"] == 5.0
    assert recipe["optim"]["adam_epsilon"] == 1e-8


def test_help_and_version(capsys):
    assert "prepare-latents" in run(capsys, "--help")[1]
    assert run(capsys, "--version")[1].startswith("dit_hf ")
    code, out, _ = run(capsys, "prepare-latents", "--help")
    assert code == 0
    assert "--crop" in out


def test_a_full_gpu_is_one_line(capsys, monkeypatch, tmp_path):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("dit_hf.evaluation.reference.load_features", full)
    code, _, error = run(capsys, "reference", "avatars", "--output_dir", str(tmp_path / "out"))
    assert code == 1
    assert error.startswith("dit-hf reference: error: the GPU's memory is full; fewer images at once (--batch_size")
    assert error.count("\n") == 1


def test_prepare_and_train_through_the_command(tmp_path, vae_folder):
    def dit_hf(*args):
        subprocess.run([sys.executable, "-m", "dit_hf", *args], check=True, cwd=tmp_path, env=os.environ)

    build = ["--source", "avatars", "--vae", str(vae_folder), "--resolution", "16", "--num_images", "40", "--flip"]
    dit_hf("prepare-latents", *build, "--output_dir", "latents")
    sizes = ["--model.num_layers", "1", "--model.num_attention_heads", "2", "--model.attention_head_dim", "8"]
    limits = ["--train.max_train_steps", "3", "--train.global_batch_size", "4", "--train.num_inference_steps", "2"]
    where = ["--data.latents", "latents", "--train.output_dir", "run", "--train.report_to", "none"]
    dit_hf("train", "--config", "recipes/avatars.yaml", *where, *sizes, *limits)
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
    assert (tmp_path / "latents" / "README.md").is_file()
