"""The verbs of the `dit-hf` command: each runs one function of the package and takes its arguments as options."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from .config import Config
from .devices import memory_errors
from .options import OneLineParser, named_options
from .progress import quiet_libraries
from .recipe_file import read_recipe, recipe_names
from .storage import check_folder, first_line

# verb: module, function, then the arguments that may be given by position; in the order of work.
VERBS = {
    "demo": ("dit_hf.demo", "demo"),
    "prepare-latents": ("dit_hf.latents.prepare", "prepare_latents", "source"),
    "merge-latents": ("dit_hf.latents.merge", "merge_latents", "parts"),
    "train-autoencoder": ("dit_hf.latents.train_autoencoder", "train_autoencoder", "source"),
    "train": ("dit_hf.training.trainer", "train", "config"),
    "sample": ("dit_hf.sampling.sample", "sample", "model"),
    "app": ("dit_hf.app.app", "app", "model"),
    "reference": ("dit_hf.evaluation.reference", "reference", "source"),
    "evaluate": ("dit_hf.evaluation.evaluate", "evaluate", "model"),
    "push": ("dit_hf.hub.push", "push", "model", "repo_id"),
    "convert": ("dit_hf.hub.convert", "convert", "source"),
}


def run(verb: str, args: list[str]) -> int:
    """Run one verb and return the exit code.

    Args:
        verb: A key of `VERBS`.
        args: The command line after the verb.

    Returns:
        0 on success, 1 if the verb failed, 2 for `train` alone, 130 after Ctrl-C, or the exit code of a process that
        the verb started. Wrong options exit with 2 through `SystemExit`, as argparse does.
    """
    if verb == "train" and not args:
        print(
            f"dit-hf train: error: which recipe? {', '.join(recipe_names())}, or a file of your own", file=sys.stderr
        )
        return 2
    # Processes that this one starts do not import what lies in the current folder, such as a json.py.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    quiet_libraries()
    # Only the module of this verb is imported: some of them take seconds.
    module, name, *_ = VERBS[verb]
    function = getattr(importlib.import_module(module), name)
    # What was imported stays: the garbage collector, which `dit_hf_cli` has stopped, need never look through it.
    gc.freeze()
    gc.enable()
    parser = build_parser(verb, function)
    options = named_options(args, parser)
    if verb == "train":
        options = _take_recipes(parser, options)
    return _run(verb, function, parser, parser.parse_args(options))


def _run(verb: str, function: Any, parser: OneLineParser, options: Namespace) -> int:
    """Call the verb's function and turn the errors that a user can fix into one line and an exit code."""
    sizes = [name for name in inspect.signature(function).parameters if name.endswith("batch_size")]
    advice = f"fewer images at once (--{sizes[0]}) need less" if sizes else "close other programs that use it"
    try:
        with memory_errors(advice):
            _call(verb, function, parser, options)
    except subprocess.CalledProcessError as error:  # from a process that the verb started, which printed the reason
        return max(1, error.returncode)
    except KeyboardInterrupt:
        print(f"dit-hf {verb}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("DIT_HF_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        where = f" (rank {rank})" if rank != "0" else ""
        print(f"dit-hf {verb}{where}: error: {first_line(error)}", file=sys.stderr)
        return 1
    return 0


def build_parser(verb: str, function: Any) -> OneLineParser:
    """Build the parser of a verb from its function's signature."""
    parser = OneLineParser(prog=f"dit-hf {verb}", allow_abbrev=False)
    parser.positions = VERBS[verb][2:]
    # `train` takes the sections of a recipe instead of a function's arguments.
    if verb == "train":
        parser.add_argument("--config", action="config")
        parser.add_argument("--dry_run", type=bool, default=False)
        parser.add_class_arguments(Config)
    else:
        parser.add_function_arguments(function)
    # Let `--flip` alone mean `--flip true`. `_typehint` is private to jsonargparse (read in 4.53).
    for action in parser._actions:
        if getattr(action, "_typehint", None) in (bool, bool | None):
            action.nargs, action.const = "?", True
    return parser


def _take_recipes(parser: OneLineParser, options: list[str]) -> list[str]:
    """Make the values of each `--config=FILE` the parser's defaults, and return the other options.

    So an option counts more than a recipe wherever it stands; of several recipes the last one does.
    """
    rest: list[str] = []
    for option in options:
        name, _, value = option.partition("=")
        if name == "--config":
            try:
                recipe = read_recipe(Path(value))
            except (ValueError, OSError) as error:
                parser.error(first_line(error))
            for section, values in recipe.items():
                parser.set_defaults({f"{section}.{key}": entry for key, entry in values.items()})
        elif name.removeprefix("--") in vars(Config()):
            parser.error(f"{name} is a section: options are spelled {name}.KEY VALUE")
        else:
            rest.append(option)
    return rest


def _call(verb: str, function: Any, parser: OneLineParser, options: Namespace) -> None:
    options = parser.instantiate(options)
    if verb == "train":
        sections = {field.name: _with_home(options[field.name]) for field in dataclasses.fields(Config)}
        function(Config(**sections), options.dry_run)
    else:
        values = {name: _with_home(value) for name, value in options.as_dict().items()}
        if values.get("output_dir") is not None:
            check_folder(Path(values["output_dir"]), "output_dir")
        function(**values)


def _with_home(value: Any) -> Any:
    """Expand `~`, which a shell leaves as it is after `--option=`, in a text and in the fields of a section."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{name: _with_home(entry) for name, entry in vars(value).items()})
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value
