"""Options of the `dit-hf` command: given by position or by name, and their errors in one line."""

from __future__ import annotations

import difflib
import json
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from .data.files import CACHE_INFO
from .recipe_file import in_words, recipe_names, recipe_path


class OneLineParser(ArgumentParser):
    """A parser that reports a wrong option in one line, suggests the nearest valid name, and exits with code 2.

    Attributes:
        positions: The options that may be given by position, in order.
    """

    positions: tuple[str, ...] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print(f"{self.prog}: error: {self._one_line(str(message))}", file=sys.stderr)
        sys.exit(2)

    def type_of(self, name: str) -> Any:
        """Return the type of the option `name`, or None. `_typehint` is private to jsonargparse (read in 4.53)."""
        return next((getattr(a, "_typehint", a.type) for a in self._actions if a.dest == name), None)

    def takes(self, name: str, following: str) -> bool:
        """Whether the argument after the option `name` is its value: `--flip` may stand alone."""
        action = next(a for a in self._actions if f"--{name}" in a.option_strings)
        if action.nargs == "?":
            return following.lower() in ("true", "false", "yes", "no")
        return action.nargs != 0

    def names(self) -> list[str]:
        """Return the names of all options."""
        return [option[2:] for action in self._actions for option in action.option_strings if option[:2] == "--"]

    def _one_line(self, message: str) -> str:
        """Say in the user's terms what jsonargparse (4.53) or argparse says over several lines."""
        if match := re.match(r'Parser key "(.+?)":', message):
            given = re.search(r"(?:Got value|Given value): (.*)", message)
            if (type_ := self.type_of(match[1])) is not None and given:
                value = {"None": "null", "True": "true", "False": "false"}.get(given[1], given[1])
                return f"--{match[1]}: expected {in_words(type_)}, got {value!r}"
        if match := re.match(r"argument (--\S+): expected one argument", message):
            return f"{match[1]} needs a value: {in_words(self.type_of(match[1][2:]))}"
        if match := re.match(r"the following arguments are required: (.*)", message):
            missing = match[1].split(", ")
            named = ", ".join(n.upper() if n in self.positions else f"--{n}" for n in missing)
            return f"missing: {named} ({self.prog} --help explains it)"
        if match := re.match(r"[Uu]nrecognized arguments: (\S+)", message):
            return self._unknown(match[1])
        lines = [line.strip() for line in message.splitlines() if line.strip()] or ["wrong options"]
        return f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]

    def _unknown(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"{argument!r} is one argument too many"
        if not argument.startswith("--"):
            return f"unknown option {argument}; options begin with two hyphens, and --help lists them"
        name = argument.lstrip("-").partition("=")[0]
        if name in ("prompt", "negative_prompt") and "attributes" in self.names():
            return f"""unknown option --{name}; models read no text: --attributes '{{"Smiling": true}}'"""
        sections = [known for known in self.names() if known.endswith(f".{name}")]
        if sections:  # of a recipe
            return f"unknown option --{name}; write it with its section: --{sections[0]}"
        near = self._nearest(name)
        return f"unknown option --{name}" + (f"; did you mean --{near}?" if near else "; --help lists the options")

    def _nearest(self, word: str) -> str | None:
        """Return the option most like `word`, which may lack the section of a recipe or have a wrong one."""
        names = self.names()
        names = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]  # no section
        if near := difflib.get_close_matches(word, names, 1, 0.75):
            return near[0]
        keys = {name.rpartition(".")[2]: name for name in names}
        key = word.rpartition(".")[2]
        near = difflib.get_close_matches(key, keys, 1, 0.75)
        near = near or [name for name in keys if name.endswith(f"_{key}")]  # such as `steps` for num_inference_steps
        return keys[near[0]] if len(near) == 1 else None


def named_options(args: list[str], parser: OneLineParser) -> list[str]:
    """Return the arguments of a verb as `--name=value`, names with underscores, a recipe's name as a path.

    Args:
        args: The command line after the verb.
        parser: The verb's parser.

    Raises:
        SystemExit: with code 2 and one line, if an option is unknown or given twice, or a recipe is not there.
    """
    left, known, waiting = list(parser.positions), parser.names(), list(args)
    options: list[str] = []
    flag = ""  # the option before, if it takes true or false and stands alone
    while waiting:
        argument = waiting.pop(0)
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            name = name if name in known else name.replace("-", "_")
            if name not in known:
                parser.error(f"unrecognized arguments: {argument}")
            if not equals and waiting and not waiting[0].startswith("--") and parser.takes(name, waiting[0]):
                equals, value = "=", waiting.pop(0)
            if equals and not value:
                parser.error(f"argument --{name}: expected one argument")
            if name in parser.positions and name not in left:
                parser.error(f"{name} is given twice, by position and as --{name}")
            left = [position for position in left if position != name]
            flag = name if not equals else ""
        elif left and not argument.startswith("-"):
            name, equals, value = left.pop(0), "=", argument
            if parser.type_of(name) == list[str]:  # which takes all that follow each other
                values = [argument]
                while waiting and not waiting[0].startswith("-"):
                    values.append(waiting.pop(0))
                value = json.dumps(values)
        else:
            parser.error(_superfluous(argument, flag, args, parser))
        if name == "config":
            if not equals:
                parser.error(f"--config needs a value: a recipe such as {recipe_names()[0]}, or a file of your own")
            if (Path(value) / CACHE_INFO).is_file():
                parser.error(f"{value} is a latent cache, not a recipe: dit-hf train celeba --data.latents {value}")
            try:
                value = str(recipe_path(value))
            except FileNotFoundError as error:
                parser.error(str(error))
        options.append(f"--{name}{equals}{value}")
    return options


def _superfluous(argument: str, flag: str, args: list[str], parser: OneLineParser) -> str:
    """Say what an argument that has no place may have been meant for; `flag` is the flag before it, if any."""
    if flag and not argument.startswith("-"):
        return f"--{flag}: expected {in_words(parser.type_of(flag))}, got {argument!r}"
    has_folder = "output_dir" not in parser.names() or any(re.match("--output[-_]dir", other) for other in args)
    if not has_folder and not argument.startswith("-"):
        return f"{argument!r} is one argument too many; the folder to write is --output_dir {argument}"
    return f"unrecognized arguments: {argument}"
