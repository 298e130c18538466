"""The contestants of the races are recipes that the trainer reads, and those of the peers also train."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from dit_hf.recipe_file import read_config
from dit_hf.training.trainer import Trainer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RACES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((BENCHMARKS / "races").glob("*.yaml"))}
CONTESTANTS = [(race, name) for race, content in RACES.items() for name in content["contestants"]]


@pytest.fixture
def read(monkeypatch, tmp_path):
    """Return the recipe of a contestant of a race, with `over` merged into its sections."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    recipes = importlib.import_module("recipes")
    yield lambda race, name, **over: _read(recipes, RACES[race], name, over, tmp_path / "recipe.yaml")
    # `recipes` and `machine` are names that others may use.
    sys.modules.pop("recipes")
    sys.modules.pop("machine")


def _read(recipes, race, name, over, path):
    recipe = recipes.contestant_recipe(race, race["contestants"][name])
    path.write_text(yaml.safe_dump(recipes.merged(recipe, over)))
    return read_config(path)


@pytest.mark.parametrize(("race", "name"), CONTESTANTS)
def test_contestants_are_recipes(race, name, read):
    read(race, name).check()
    contestant = RACES[race]["contestants"][name]
    assert contestant["images"] >= RACES[race]["base"]["train"]["global_batch_size"]
    assert len(set(contestant["seeds"])) == len(contestant["seeds"]) > 0


@pytest.mark.parametrize("name", RACES["peers"]["contestants"])
def test_peers_train(name, read, training_latents):
    AcceleratorState._reset_state(reset_partial_state=True)
    small = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    train = {"global_batch_size": 8, "report_to": "none", "mixed_precision": "no"}
    trainer = Trainer(read("peers", name, model=small, train=train, data={"latents": str(training_latents)}))
    before = [parameter.detach().clone() for parameter in trainer.transformer.parameters()]
    grad_norm = trainer.step(0)
    assert torch.isfinite(grad_norm)
    assert grad_norm > 0
    assert any((a != b).any() for a, b in zip(before, trainer.transformer.parameters(), strict=True))


def test_peers_have_their_published_settings(read):
    rates = {
        "lightningdit": (2e-4, 0.95, 0.0),
        "sit": (1e-4, 0.999, 1.0),
        "diffusers": (1e-4, 0.999, 1.0),
    }
    for name, expected in rates.items():
        config = read("peers", name)
        optim = config.optim
        assert optim.optimizer == "adamw"
        assert (optim.learning_rate, optim.adam_beta2, optim.max_grad_norm) == expected
        assert config.objective.num_train_timesteps == 1000
    assert read("peers", "lightningdit").objective.timestep_sampling == "logit_normal"
