"""The command line: help, errors in one line with exit codes, and whole commands."""

import re
import subprocess
import sys

import pytest
import torch
import yaml

from dit_hf.cli import VERBS, build_parser
from dit_hf.command_help import command_help, verb_help
from dit_hf.latents.prepare import prepare_latents
from dit_hf.options import named_options
from dit_hf.recipe_file import read_config, recipe_path
from dit_hf.runs import check_model
from dit_hf_cli import help_text, main


def run(capsys, *args):
    try:
        code = main(list(args))
    except SystemExit as exit_:
        code = exit_.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("verb", ["prepare-latents", "evaluate", "push", "demo", "train-autoencoder", "sample"])
def test_a_link_to_itself_is_refused_before_any_work(capsys, tmp_path, verb):
    (tmp_path / "loop").symlink_to("loop")
    given = [] if verb == "demo" else ["x"]
    code, _, error = run(capsys, verb, *given, "--output_dir", str(tmp_path / "loop"))
    assert code == 1
    assert (
        error == f"dit-hf {verb}: error: output_dir {tmp_path}/loop is a link that leads nowhere; name a new folder\n"
    )


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["trian"], 2, "did you mean 'train'"),
        (["TRAIN"], 2, "did you mean 'train'"),
        (["--verson"], 2, "did you mean '--version'"),
        (["help", "train"], 2, "did you mean 'train --help'"),
        (["prepare-latents", "--sorce", "x"], 2, "unknown option --sorce; did you mean --source?"),
        (
            ["prepare-latents", "x", "--num_images", "many"],
            2,
            "--num_images: expected a whole number or null, got 'many'",
        ),
        (["prepare-latents", "x", "--output_dir"], 2, "--output_dir needs a value: text"),
        (["prepare-latents", "x", "--output_dir", "--flip"], 2, "--output_dir needs a value: text"),
        (["prepare-latents", "x", "--output_dir="], 2, "--output_dir needs a value: text"),
        (["prepare-latents", "x", "-o", "y"], 2, "unknown option -o; options begin with two hyphens"),
        (["prepare-latents", "x", "--vae", "avatars", "--output_dir", "y"], 1, "no such folder"),
        (["prepare-latents", "x", "--flip", "3", "--output_dir", "y"], 2, "--flip: expected true or false, got '3'"),
        (["prepare-latents", "x", "--flip=3"], 2, "--flip: expected true or false, got '3'"),
        (["prepare-latents", "x"], 2, "missing: --output_dir (dit-hf prepare-latents --help explains it)"),
        (["prepare-latents", "x", "y"], 2, "'y' is one argument too many; the folder to write is --output_dir y"),
        (["prepare-latents", "x", "--output-dir", "y", "--resolution", "8", "8"], 2, "'8' is one argument too many\n"),
        (["app", "m", "7860"], 2, "'7860' is one argument too many"),
        (["prepare-latents", "x", "--output_dir", "y", "--max_left_out", "2"], 1, "max_left_out=2: expected a share"),
        (["prepare-latents", "x", "--output_dir", "y", "--push_to_hub", "faces"], 1, "faces: expected OWNER/NAME"),
        (["prepare-latents", "avatars", "--output_dir", "y", "--seed", "-1"], 1, "seed=-1 must be at least 0"),
        (
            ["prepare-latents", "avatars", "--output_dir", "y", "--image_column", "a"],
            1,
            "--image_column a: only a data",
        ),
        (["sample", "m", "--steps", "9"], 2, "unknown option --steps; did you mean --num_inference_steps?"),
        (["train", "--config"], 2, "--config needs a value: a recipe such as avatars, or a file of your own"),
        (["train", "-lr", "3", "avatars"], 2, "unknown option -lr; options begin with two hyphens"),
        (["train", "avatars", "--train.push_to_hub", "--train.hub_model_id", "faces"], 1, "expected OWNER/NAME"),
        (["train-autoencoder", "x", "--output_dir", "y", "--max_train_steps", "0"], 1, "max_train_steps=0 must be"),
        (["push", "m", "faces"], 1, "REPO_ID faces: expected OWNER/NAME, such as me/my-faces"),
        (["prepare-latents", "x", "--source", "y"], 2, "source is given twice, by position and as --source"),
        (["sample", "--output_dir", "x"], 2, "missing: MODEL"),
        (["sample", "m", "--prompt", "a face"], 2, "models read no text: --attributes '{\"Smiling\": true}'"),
        (["sample", "m", "--mode", "magic"], 2, "--mode: expected one of generate, img2img, inpaint"),
        (["sample", "m", "--options", "3"], 2, "--options: expected a JSON object or null, got '3'"),
        (["sample", "nowhere", "--output_dir", "x"], 1, "nowhere: no such folder; a model on the Hub is OWNER/NAME"),
        (["train"], 2, "which recipe? avatars, celeba, celeba-l1, small, or a file of your own"),
        (
            ["train", "celeb"],
            2,
            "'celeb': no such file; the recipes that come with dit_hf are avatars, celeba, celeba-l1",
        ),
        (["train", "nowhere.yaml"], 2, "'nowhere.yaml': no such file"),
        (["train", "avatars", "--max_train_steps", "3"], 2, "write it with its section: --train.max_train_steps"),
        (["train", "avatars", "--train.max_train_step", "3"], 2, "did you mean --train.max_train_steps?"),
        (["train", "avatars", "--model.learning_rate", "3"], 2, "did you mean --optim.learning_rate?"),
        (["train", "avatars", "--lerning_rate", "3"], 2, "did you mean --optim.learning_rate?"),
        (
            ["train", "avatars", "--optim.learning_rate", "fast"],
            2,
            "--optim.learning_rate: expected a number, got 'fast'",
        ),
        (
            ["train", "avatars", "--train.report_to", "null"],
            2,
            "expected one of wandb, tensorboard, trackio, none, got 'null'",
        ),
        (["train", "--data", "module.Class"], 2, "--data is a section: options are spelled --data.KEY VALUE"),
        (["prepare-latents", "x", "--output_dir", "y", "--max_left_out", "nan"], 2, "expected a number, got 'nan'"),
        (["train", "--train.output_dir="], 2, "--train.output_dir needs a value: text"),
        (["train", "avatars", "--print_config", "--train.seed"], 2, "--train.seed needs a value: a whole number"),
        (["train", "avatars", "--train.mixed_precision", "fp32"], 2, "expected no, fp16, bf16 or null, got 'fp32'"),
        (["reference", "avatars", "--features", "fid"], 1, "features fid: expected inception, inception-clean"),
        (["push", "m", "--output_dir", "x", "--max_shard_size", "big"], 1, "expected a size such as 500MB or 5GB"),
        (["convert", "nowhere.pt", "--output_dir", "x"], 1, "nowhere.pt: no such file or folder"),
        (["app", "m", "--port", "80000"], 1, "port=80000 must be between 1 and 65535"),
        (["train", "--data.latents", "nowhere"], 1, "not a latent cache"),
        (["prepare-latents", "nowhere", "--vae", "avatar", "--output_dir", "x"], 1, "no such folder"),
        (["demo", "--minutes", "-1"], 1, "minutes=-1"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, monkeypatch, args, code, message):
    monkeypatch.chdir(tmp_path)
    got, _, err = run(capsys, *args)
    lines = [line for line in err.splitlines() if "error" in line]
    assert got == code
    assert len(lines) == 1
    assert message in f"{lines[0]}\n"
    assert "Traceback" not in err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["prepare-latents", "reference", "evaluate", "push", "demo", "sample", "convert"])
def test_a_file_as_output_dir_is_refused_before_any_work(capsys, tmp_path, verb):
    (tmp_path / "one.png").touch()
    code, out, error = run(capsys, verb, *([] if verb == "demo" else ["x"]), "--output_dir", str(tmp_path / "one.png"))
    assert (code, out) == (1, "")
    assert error == f"dit-hf {verb}: error: output_dir {tmp_path}/one.png is a file; name a new folder\n"


def test_a_missing_file_to_convert_is_not_asked_for_on_the_hub(capsys, monkeypatch):
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_: pytest.fail("asked"))
    error = run(capsys, "convert", "nowhere.pt", "--output_dir", "x")[2]
    assert error == "dit-hf convert: error: nowhere.pt: no such file or folder; a pipeline on the Hub is OWNER/NAME\n"


def test_a_push_with_its_arguments_exchanged_names_their_order(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    error = run(capsys, "push", "me/faces", "run")[2]
    assert error == "dit-hf push: error: run is a folder: the model comes first (dit-hf push run me/faces)\n"


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


@pytest.mark.parametrize("place", [0, 4], ids=["before", "after"])
def test_an_option_counts_more_than_the_recipe_wherever_it_stands(capsys, place):
    args = ["--optim.learning_rate", "0.005", "--objective.logit_mean", "-1e-1"]
    args[place:place] = ["--config", "avatars"]
    code, out, _ = run(capsys, "train", *args, "--print_config")
    assert code == 0
    recipe = yaml.safe_load(out)
    assert (recipe["optim"]["learning_rate"], recipe["objective"]["logit_mean"]) == (0.005, -0.1)
    assert recipe["train"]["max_train_steps"] == read_config(recipe_path("avatars")).train.max_train_steps


def test_the_home_folder_is_meant_by_a_tilde(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{tmp_path}/latents is not a latent cache" in run(capsys, "train", "--data.latents=~/latents")[2]
    (tmp_path / "home.yaml").write_text("data: {latents: ~/from-a-recipe}\n")
    recipe = ["--config", str(tmp_path / "home.yaml")]
    assert f"{tmp_path}/from-a-recipe is not a latent cache" in run(capsys, "train", *recipe)[2]
    prepare = ["--output_dir", str(tmp_path / "x"), "--vae", "avatar"]
    assert f"source {tmp_path}/images" in run(capsys, "prepare-latents", "--source=~/images", *prepare)[2]


def test_a_path_of_another_kind_is_named(capsys, tmp_path, monkeypatch, latents):
    """Each of them is often taken for another."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_images").mkdir()
    (tmp_path / "my_images" / "one.jpg").touch()
    (tmp_path / "one.pt").write_text("no weights")
    (tmp_path / "latents").symlink_to(latents)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latents").symlink_to(latents)
    (tmp_path / "run" / "config.yaml").write_text("train: {seed: 1}\n")
    for args, message in {
        ("train", "latents"): "latents is a latent cache, not a recipe: dit-hf train celeba --data.latents latents",
        ("train", "my_images"): "'my_images': a folder, not a recipe",
        ("train", "--data.latents", "my_images"): "my_images is not a latent cache (no latents.json in it); make one",
        (
            "train",
            "--data.latents",
            "run",
        ): "run is not a latent cache (no latents.json in it); did you mean run/latents?",
        ("train", "run"): "'run': a folder, not a recipe; a run's recipe is run/config.yaml",
        ("prepare-latents", "latents"): "latents is a latent cache, whose images are encoded already",
        ("prepare-latents", "my_image"): "source my_image: no such folder; did you mean my_images?",
        ("sample", "my_images"): "neither of a run, nor of a checkpoint, nor of a pipeline",
        ("sample", "."): "neither of a run, nor of a checkpoint, nor of a pipeline; did you mean run?",
        (
            "prepare-latents",
            "my_images",
            "--image_column",
            "a",
        ): "--image_column a: only a dataset has one, and my_images",
        ("sample", "one.pt"): "one.pt is a file; a model is the folder of a run",
        ("convert", "my_images"): "my_images: a folder without model_index.json",
        ("convert", "one.pt"): "one.pt: no weights can be read from it (not a file of tensors alone)",
    }.items():
        where = ["--output_dir", "x"] if args[0] != "train" else []
        vae = ["--vae", "avatar"] if args[0] == "prepare-latents" else []
        code, _, err = run(capsys, *args, *where, *vae)
        assert code in (1, 2)
        assert err.count("\n") == 1
        assert message in err


@pytest.mark.parametrize("name", ["dit-hf", *VERBS])
def test_help_is_what_the_signatures_say(name):
    """`python -m dit_hf.command_help` writes it anew."""
    assert help_text(name) == (command_help() if name == "dit-hf" else verb_help(name))


@pytest.mark.parametrize(
    "args", [[], ["--help"], ["--version"], ["sample", "--help"], ["train", "x", "-h"], ["trian"]]
)
def test_questions_about_the_command_import_nothing_heavy(args):
    code = (
        f"import sys, dit_hf_cli; dit_hf_cli.main({args}); sys.exit('torch' in sys.modules or 'dit_hf' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "dit" in done.stdout + done.stderr


@pytest.mark.parametrize("form", ["--output-dir=here", "--output_dir=here", "--output-dir here"])
@pytest.mark.parametrize("source", ["images", "--source images", "--source=images"])
def test_options_are_spelled_in_every_usual_way(form, source):
    parser = build_parser("prepare-latents", prepare_latents)
    options = parser.parse_args(named_options([*form.split(), "--flip", *source.split()], parser))
    assert (options.source, options.output_dir, options.flip) == ("images", "here", True)


def test_a_model_that_is_none_is_named_without_the_hub(tmp_path, latents):
    (tmp_path / "faces" / "checkpoint-5").mkdir(parents=True)
    for model, message in {
        str(latents): f"is a latent cache, not a model: dit-hf train celeba --data.latents {latents}",
        str(tmp_path / "face"): f"did you mean {tmp_path / 'faces'}",
        str(tmp_path / "faces" / "checkpoint-9"): "its checkpoints are checkpoint-5",
        "./faces/checkpoint-9": "no such folder",
        "~/faces": "no such folder",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            check_model(model)
    check_model("someone/faces")  # on the Hub


@pytest.mark.parametrize(
    ("verb", "function", "option"),
    [
        (["reference", "avatars"], "dit_hf.evaluation.reference.load_features", "--batch_size"),
        (
            ["train-autoencoder", "--source", "avatars"],
            "dit_hf.latents.train_autoencoder.open_images",
            "--train_batch_size",
        ),
    ],
)
def test_a_full_gpu_is_one_line(capsys, monkeypatch, tmp_path, verb, function, option):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(function, full)
    code, _, error = run(capsys, *verb, "--output_dir", str(tmp_path / "out"))
    assert code == 1
    message = f"the GPU's memory is full; fewer images at once ({option})"
    assert error.startswith(f"dit-hf {verb[0]}: error: {message}")
    assert error.count("\n") == 1
