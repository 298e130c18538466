"""Recipes are read strictly: what stands there is what is meant, or a line that names it."""

import dataclasses

import pytest

from dit_hf.config import Config
from dit_hf.recipe_file import read_config


def read(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {ema_decay: 0.9}\noptim: {learning_rate: 1}\n", "line 2: optim stands twice, first in line 1"),
        ("optim:\n  ema_decay: 0.9\n  ema_decay: 0.5\n", r"line 3: optim\.ema_decay stands twice, first in line 2"),
        ("optim:\n  ema_deca: 0.9\n", r"line 2: unknown key optim\.ema_deca; did you mean 'ema_decay'"),
        ("optim: {0: 1}\n", r"line 1: unknown key optim\.0; valid are optimizer"),
        ("config: /etc/hostname\n", "line 1: unknown section config; "),
        ("optimizer: {}\n", "line 1: unknown section optimizer; did you mean 'optim'"),
        ("learning_rate: 0.1\n", "line 1: unknown section learning_rate; it is a key of the section optim"),
        ("train: {learning_rate: 0.1}\n", r"unknown key train\.learning_rate; it is a key of the section optim"),
        ("train:\n\tseed: 1\n", "line 2: a tab; indent with spaces"),
        ("train: {report_to: null}\n", "expected one of wandb, tensorboard, trackio, none, got 'null'"),
        ("train: {class_path: mod.D}\n", r"unknown key train\.class_path"),
        ("data: mod.D\n", r"line 1: data is a section: expected keys below it \(latents, "),
        ("train: !!python/object/apply:os.system [id]\n", "line 1: train is a section"),
        ("train: {seed: !!python/object/apply:os.getpid []}\n", "seed: expected a whole number, got several values"),
        ("train: {output_dir: !evil x}\n", r"train\.output_dir: expected text, got 'x'"),
        ("train: {mixed_precision: float16}\n", "expected no, fp16, bf16 or null, got 'float16'"),
        ("data: {conditions: class}\n", r"data\.conditions: expected a list such as \[a, b\] or null, got 'class'"),
        ("optim: {learning_rate: fast}\n", "expected a number, got 'fast'"),
        ("optim: {learning_rate: .nan}\n", "expected a number, got '.nan'"),
        ("optim: {learning_rate: [1]}\n", "expected a number, got several values"),
        ("train: {max_train_steps: 1.5}\n", "expected a whole number, got '1.5'"),
        ("train: {push_to_hub: 2}\n", "expected true or false, got '2'"),
        ("train: {max_train_steps: null}\n", "expected a whole number, got 'null'"),
        ("", "is not a recipe: it has none of the sections data, model, objective, optim, train"),
        ("[]\n", "is not a recipe: it has none of the sections"),
        ("just words\n", "is not a recipe: it has none of the sections"),
        ("train: {seed: 1\n", "line 2: "),
        ("train: {seed: *one}\n", "line 1: found undefined alias"),
        ("train: " + "[" * 5000, "nested too deep"),
        (b"train: {output_dir: \xff\xfe}\n", "not text in UTF-8"),
    ],
)
def test_what_is_not_a_recipe_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, text)
    assert "mine.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_aliases_of_aliases_end_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    with pytest.raises(ValueError, match="unknown section a0"):
        read(tmp_path, "\n".join(lines))
    with pytest.raises(ValueError, match="expected text, got several values"):
        read(tmp_path, "data: {conditions: [&a [x, x], [*a, *a]]}")


def test_values_are_read_as_the_type_of_their_field(tmp_path):
    config = read(
        tmp_path,
        "train: {mixed_precision: no, push_to_hub: yes, max_train_steps: 1_000, hub_revision: 'null',\n"
        "  output_dir: on}\n"
        "optim: {learning_rate: 1e-3, adam_epsilon: 1E-9, extra_ema_decays: [0.9, 5e-1]}\n"
        "objective: {logit_mean: -1e-1, snr_gamma: null}\n"
        "data: {conditions: [no, 5_o_Clock_Shadow, '1', null]}\n",
    )
    assert config.train.mixed_precision == "no"
    assert config.train.push_to_hub is True
    assert config.train.max_train_steps == 1000
    assert config.train.hub_revision == "null"
    assert config.train.output_dir == "on"
    assert (config.optim.learning_rate, config.optim.adam_epsilon) == (1e-3, 1e-9)
    assert config.optim.extra_ema_decays == [0.9, 0.5]
    assert (config.objective.logit_mean, config.objective.snr_gamma) == (-0.1, None)
    assert config.data.conditions == ["no", "5_o_Clock_Shadow", "1", "null"]


def test_whatever_is_written_is_read_again(tmp_path):
    config = Config()
    config.data = dataclasses.replace(config.data, latents="no", conditions=["null", "~", "1e3", "", "a: b", "é\n"])
    config.model = dataclasses.replace(config.model, qk_norm="rms_norm", init_from="#x")
    config.train = dataclasses.replace(config.train, output_dir="~/1", mixed_precision="no", torch_compile=False)
    config.optim = dataclasses.replace(config.optim, learning_rate=1e-30, extra_ema_decays=[1e-8, 1.0])
    assert read(tmp_path, config.to_yaml()) == config
    assert read(tmp_path, b"\xef\xbb\xbf" + config.to_yaml().encode()) == config


def test_words_that_yaml_reads_as_something_else_are_what_they_say(tmp_path):
    train = read(tmp_path, "train: {mixed_precision: no, output_dir: no, hub_model_id: 12/1e3}\n").train
    assert (train.mixed_precision, train.output_dir, train.hub_model_id) == ("no", "no", "12/1e3")
