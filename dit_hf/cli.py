"""`dit-hf VERB`: each verb is one function of the package, its options that function's arguments."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import subprocess
import sys
from typing import Any, NoReturn

import docstring_parser
import torch
from jsonargparse import ArgumentParser, Namespace

from .storage import first_line

# verb: module, function, and the arguments that are given without their names.
VERBS = {
    "app": ("dit_hf.app.app", "app", "model"),
    "convert": ("dit_hf.hub.convert", "convert", "source"),
    "demo": ("dit_hf.demo", "demo"),
    "evaluate": ("dit_hf.evaluation.evaluate", "evaluate", "model"),
    "prepare-latents": ("dit_hf.latents.prepare", "prepare_latents"),
    "push": ("dit_hf.hub.push", "push", "model", "repo_id"),
    "reference": ("dit_hf.evaluation.reference", "reference", "source"),
    "sample": ("dit_hf.sampling.sample", "sample", "model"),
    "train": ("dit_hf.training.trainer", "train"),
    "train-autoencoder": ("dit_hf.latents.train_autoencoder", "train_autoencoder"),
}


class OneLineParser(ArgumentParser):
    """Says in one line what is wrong with an option, with the nearest known one, and exits with 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        lines = [line.strip() for line in str(message).splitlines() if line.strip()]
        text = lines[0] if lines else "wrong options"
        if text.endswith(":") and len(lines) > 1:
            text = f"{text} {lines[1]}"
        known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        known += [name.split(".", 1)[1] for name in known if "." in name]
        for name in re.findall(r"[\w.-]+", text):
            name = name.lstrip("-")
            nearest = difflib.get_close_matches(name, known, 1, 0.75)
            if name not in known and nearest:
                text += f"; did you mean {nearest[0]!r}?"
                break
        print(f"{self.prog}: error: {text}", file=sys.stderr)
        sys.exit(2)


def main(args: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    args = sys.argv[1:] if args is None else args
    verb = args[0] if args else "--help"
    if verb in ("-h", "--help"):
        print(f"usage: dit-hf VERB [options]\n\nverbs: {', '.join(VERBS)}\n\n`dit-hf VERB --help` shows its options.")
        return 0
    if verb == "--version":
        from . import __version__

        print(f"dit_hf {__version__}")
        return 0
    if verb not in VERBS:
        nearest = difflib.get_close_matches(verb, VERBS, 1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(VERBS)}"
        print(f"dit-hf: error: unknown verb {verb!r}{hint}", file=sys.stderr)
        return 2
    module, name, *positional = VERBS[verb]
    function = getattr(importlib.import_module(module), name)
    parser = _parser(verb, function, positional)
    options = parser.parse_args(_inline_recipe(args[1:]) if verb == "train" else args[1:])
    try:
        _call(verb, function, parser, options)
    except subprocess.CalledProcessError as error:  # a process that the verb started; it has said why
        return max(1, error.returncode)
    except KeyboardInterrupt:
        print(f"dit-hf {verb}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if os.environ.get("DIT_HF_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        what = first_line(error)
        if isinstance(error, torch.OutOfMemoryError):
            what = f"the GPU's memory is full; fewer images at once (--batch_size) need less ({what})"
        print(f"dit-hf {verb}{f' (rank {rank})' if rank != '0' else ''}: error: {what}", file=sys.stderr)
        return 1
    return 0


def _parser(verb: str, function: Any, positional: list[str]) -> OneLineParser:
    # The source of the options' help is the docstring, whose first paragraph describes the verb.
    description = (inspect.getdoc(function) or "").split("\n\n")[0]
    parser = OneLineParser(prog=f"dit-hf {verb}", description=description, allow_abbrev=False)
    if verb == "train":
        from .config import Config

        parser.add_argument("--config", action="config", help="A recipe (YAML).")
        parser.add_class_arguments(Config)
    else:
        explained = {one.arg_name: one.description for one in docstring_parser.parse(function.__doc__).params}
        for name in positional:
            optional = inspect.signature(function).parameters[name].default is not inspect.Parameter.empty
            parser.add_argument(name, type=str, nargs="?" if optional else None, help=explained[name])
        parser.add_function_arguments(function, skip={*positional})
        for action in parser._actions:
            if getattr(action, "_typehint", None) is bool:  # `--flip` alone means true
                action.nargs, action.const = "?", True
    return parser


def _inline_recipe(args: list[str]) -> list[str]:
    """The options with `--config NAME` made a path, so that a recipe that came with dit_hf is found by its name."""
    from .config import recipe_path

    found = list(args)
    for i, arg in enumerate(args):
        value = (
            arg.partition("=")[2]
            if arg.startswith("--config=")
            else args[i + 1]
            if arg == "--config" and args[i + 1 :]
            else None
        )
        if value is None:
            continue
        try:
            path = str(recipe_path(value))
        except FileNotFoundError as error:
            print(f"dit-hf train: error: {error}", file=sys.stderr)
            sys.exit(2)
        if arg == "--config":
            found[i + 1] = path
        else:
            found[i] = f"--config={path}"
    return found


def _call(verb: str, function: Any, parser: OneLineParser, options: Namespace) -> None:
    options = parser.instantiate(options)
    if verb == "train":
        from .config import Config

        names = ("data", "model", "objective", "optim", "train")
        function(Config(**{name: options[name] for name in names}))
    else:
        function(**options.as_dict())


if __name__ == "__main__":
    sys.exit(main())
