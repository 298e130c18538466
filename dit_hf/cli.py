"""The `dit-hf` command: each verb runs one function of the package and takes its arguments as options."""

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
from jsonargparse import ArgumentParser, Namespace

from .devices import memory_errors
from .storage import first_line

# verb: module, function, then the arguments that are positional on the command line.
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
    """A parser that reports a wrong option in one line, suggests the nearest valid name, and exits with code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # jsonargparse spreads a message over several lines: keep the headline and the reason below it.
        lines = [line.strip() for line in str(message).splitlines() if line.strip()]
        text = lines[0] if lines else "wrong options"
        if text.endswith(":") and len(lines) > 1:
            text = f"{text} {lines[1]}"
        # A key of a recipe appears in the message without its section.
        valid_names = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        valid_names += [name.split(".", 1)[1] for name in valid_names if "." in name]
        # Suggest a name for the first word of the message that looks like a misspelt option.
        for word in re.findall(r"[\w.-]+", text):
            word = word.lstrip("-")
            nearest = difflib.get_close_matches(word, valid_names, 1, 0.75)
            if word not in valid_names and nearest:
                text += f"; did you mean {nearest[0]!r}?"
                break
        print(f"{self.prog}: error: {text}", file=sys.stderr)
        sys.exit(2)


def main(args: list[str] | None = None) -> int:
    """Run one verb and return the exit code.

    Args:
        args: The command line without the program's name; None is `sys.argv[1:]`.

    Returns:
        0 on success, 1 if the verb failed, 2 for an unknown verb, 130 after Ctrl-C, or the exit code of a process that
        the verb started. Wrong options exit with 2 through `SystemExit`, as argparse does.
    """
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
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; valid verbs are {', '.join(VERBS)}"
        print(f"dit-hf: error: unknown verb {verb!r}{hint}", file=sys.stderr)
        return 2
    # Only the module of the chosen verb is imported: some of them take seconds.
    module, name, *positional = VERBS[verb]
    function = getattr(importlib.import_module(module), name)
    parser = _build_parser(verb, function, positional)
    options = parser.parse_args(_resolve_recipes(args[1:]) if verb == "train" else args[1:])
    return _run(verb, function, parser, options)


def _run(verb: str, function: Any, parser: OneLineParser, options: Namespace) -> int:
    """Call the verb's function and turn the errors that a user can fix into one line and an exit code."""
    try:
        with memory_errors("fewer images at once (--batch_size) need less"):
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


def _build_parser(verb: str, function: Any, positional: list[str]) -> OneLineParser:
    """Build the parser of a verb from its function's signature and docstring."""
    description = (inspect.getdoc(function) or "").split("\n\n")[0]
    parser = OneLineParser(prog=f"dit-hf {verb}", description=description, allow_abbrev=False)
    # `train` takes the sections of a recipe instead of a function's arguments.
    if verb == "train":
        from .config import Config

        parser.add_argument("--config", action="config", help="A recipe (YAML).")
        parser.add_class_arguments(Config)
        return parser
    # Positional arguments are added by hand, because jsonargparse would make options of them.
    help_texts = {param.arg_name: param.description for param in docstring_parser.parse(function.__doc__).params}
    for name in positional:
        optional = inspect.signature(function).parameters[name].default is not inspect.Parameter.empty
        parser.add_argument(name, type=str, nargs="?" if optional else None, help=help_texts[name])
    parser.add_function_arguments(function, skip={*positional})
    # Let `--flip` alone mean `--flip true`. `_typehint` is private to jsonargparse (read in 4.53).
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:
            action.nargs, action.const = "?", True
    return parser


def _resolve_recipes(args: list[str]) -> list[str]:
    """Replace the NAME in `--config NAME` by a path, so that the recipes that come with dit_hf are found by name."""
    from .config import recipe_path

    resolved = list(args)
    for i, arg in enumerate(args):
        # Both spellings: `--config NAME` and `--config=NAME`.
        if arg.startswith("--config="):
            name = arg.partition("=")[2]
        elif arg == "--config" and i + 1 < len(args):
            name = args[i + 1]
        else:
            continue
        try:
            path = str(recipe_path(name))
        except FileNotFoundError as error:
            print(f"dit-hf train: error: {error}", file=sys.stderr)
            sys.exit(2)
        if arg == "--config":
            resolved[i + 1] = path
        else:
            resolved[i] = f"--config={path}"
    return resolved


def _call(verb: str, function: Any, parser: OneLineParser, options: Namespace) -> None:
    options = parser.instantiate(options)
    if verb == "train":
        from .config import Config

        sections = ("data", "model", "objective", "optim", "train")
        function(Config(**{section: options[section] for section in sections}))
    else:
        function(**options.as_dict())


if __name__ == "__main__":
    sys.exit(main())
