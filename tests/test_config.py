"""The recipe: help, bounds and files."""

import dataclasses
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from dit_hf.config import Config
from dit_hf.recipe_file import read_config, recipe_path

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def test_every_option_has_a_help_text():
    parser = ArgumentParser()
    parser.add_class_arguments(Config)
    helps = {action.dest: action.help for action in parser._actions}
    for section, options in vars(Config()).items():
        for option in dataclasses.fields(options):
            assert len(helps[f"{section}.{option.name}"] or "") > 15, option.name


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_read_and_written_and_are_within_their_bounds(recipe, tmp_path):
    config = read_config(recipe)
    config.check()
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert read_config(tmp_path / "again.yaml") == config
    assert recipe_path(recipe.stem) == recipe


def test_entries_of_a_list_are_within_bounds_and_none_always_is():
    config = Config()
    config.model.num_layers = None
    config.check()
    config.optim.extra_ema_decays = [0.9, 1.5]
    with pytest.raises(ValueError, match=r"optim\.extra_ema_decays=1\.5 must be between 0 and 1"):
        config.check()


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("train", "output_dir", "", "is empty: name a folder"),
        ("data", "latents", " ", "is empty: name a folder"),
        ("optim", "adam_beta1", 1.0, "must be at least 0 and below 1"),
        ("optim", "adam_beta2", 1.0, "must be at least 0 and below 1"),
        ("optim", "adam_epsilon", -1.0, "must be above 0"),
        ("optim", "adam_epsilon", 0.0, "must be above 0"),
        ("optim", "adam_epsilon", float("nan"), "must be a finite number"),
        ("train", "guidance_scale", float("inf"), "must be a finite number"),
        ("objective", "snr_gamma", 0.0, "must be above 0"),
        ("model", "num_layers", 10**9, "must be between 1 and 1000"),
        ("objective", "num_train_timesteps", 10**10, "must be between 1 and 100000"),
        ("train", "output_dir", " ", r"is empty: name a folder \(\. is the one you are in\)"),
        ("data", "conditions", ["a", "b", "a"], "names 'a' twice"),
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_values_that_cannot_work_are_refused_whatever_the_optimizer(optimizer, section, key, value, message):
    config = Config()
    config.optim.optimizer = optimizer
    setattr(getattr(config, section), key, value)
    with pytest.raises(ValueError, match=rf"{section}\.{key}.*{message}"):
        config.check()


def test_two_configs_share_no_list():
    Config().optim.extra_ema_decays.append(0.5)
    assert Config().optim.extra_ema_decays == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_can_be_read_and_its_command_names_it(path):
    config = read_config(path)
    config.check()
    assert f"--config recipes/{path.name}" in path.read_text()
    assert f"--output_dir {config.data.latents}\n" in path.read_text()


def test_shipped_recipes_are_found_by_name():
    assert recipe_path("recipes/avatars.yaml").name == "avatars.yaml"
    assert recipe_path("celeba-l1").is_file()
    for name in ("nothing", "elsewhere/avatars.yaml", ""):
        with pytest.raises(FileNotFoundError, match=f"{name}.*; the recipes that come with dit_hf are"):
            recipe_path(name)
