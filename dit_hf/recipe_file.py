"""Read a recipe from a YAML file, strictly: what stands there is what is meant, or an error names the line.

Values are read by the types of the fields in `config.py` and not by YAML's rules, by which `no` is false, `1e-3` is
text and a key that stands twice counts once.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from .config import Config
from .storage import first_line, shipped_file

_NULLS, _TRUE, _FALSE = ("null", "~", ""), ("true", "yes", "on"), ("false", "no", "off")


def read_config(path: Path) -> Config:
    """Read a recipe; keys that it leaves out have their defaults.

    Raises:
        ValueError: naming the file, the line and the key, if it is not a recipe.
        OSError: if it cannot be read.
    """
    config = Config()
    for section, values in read_recipe(path).items():
        setattr(config, section, dataclasses.replace(getattr(config, section), **values))
    return config


def read_recipe(path: Path) -> dict[str, dict[str, Any]]:
    """Read the values that a recipe sets, by section and key; errors as by [`read_config`]."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a recipe: it is not text in UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        problem = "a tab; indent with spaces" if "'\\t'" in problem else f"{problem}; expected lines of `key: value`"
        raise ValueError(f"{path}{where}: {problem}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not a recipe: its values are nested too deep") from error
    sections = typing.get_type_hints(Config)
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise ValueError(f"{path} is not a recipe: it has none of the sections {', '.join(sections)}")
    values = {}
    for section, node in _entries(root, f"{path}", sections).items():
        if not isinstance(node, yaml.MappingNode):
            keys = ", ".join(list(typing.get_type_hints(sections[section]))[:3])
            raise ValueError(f"{_at(path, node)}: {section} is a section: expected keys below it ({keys}, ...)")
        hints = typing.get_type_hints(sections[section])
        entries = _entries(node, f"{path}", hints, f"{section}.")
        values[section] = {key: _value(entry, hints[key], path, f"{section}.{key}") for key, entry in entries.items()}
    return values


def recipe_path(name: str) -> Path:
    """Find a recipe: the file `name`, or else the recipe of that name that comes with dit_hf.

    Raises:
        FileNotFoundError: if there is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.stem in recipe_names() and str(path.parent) in (".", "recipes"):
        return shipped_file(f"recipes/{path.stem}.yaml")
    if (path / "config.yaml").is_file():
        raise FileNotFoundError(f"{name!r}: a folder, not a recipe; a run's recipe is {path / 'config.yaml'}")
    problem = "a folder, not a recipe" if path.is_dir() else "no such file"
    names = ", ".join(recipe_names())
    raise FileNotFoundError(f"{name!r}: {problem}; the recipes that come with dit_hf are {names}")


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with dit_hf."""
    return sorted(path.stem for path in shipped_file("recipes/avatars.yaml").parent.glob("*.yaml"))


def _at(path: str | Path, node: yaml.Node) -> str:
    return f"{path}, line {node.start_mark.line + 1}"


def _entries(node: yaml.MappingNode, path: str, valid: dict[str, Any], prefix: str = "") -> dict[str, yaml.Node]:
    """Return the entries of a mapping, whose keys are all in `valid` and stand once."""
    entries: dict[str, yaml.Node] = {}
    lines: dict[str, int] = {}
    for key, entry in node.value:
        name = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
        if name in entries:
            raise ValueError(f"{_at(path, key)}: {prefix}{name} stands twice, first in line {lines[name]}")
        if name not in valid:
            unknown = f"unknown {'key' if prefix else 'section'} {prefix}{name}"
            raise ValueError(f"{_at(path, key)}: {unknown}; {_hint(name, valid, bool(prefix))}")
        entries[name], lines[name] = entry, key.start_mark.line + 1
    return entries


def _hint(name: str, valid: dict[str, Any], is_key: bool) -> str:
    """Say what an unknown name may stand for: one like it, or a key without its section or in another one."""
    nearest = difflib.get_close_matches(name, valid, 1)
    sections = [s for s, fields in typing.get_type_hints(Config).items() if name in typing.get_type_hints(fields)]
    if sections and (is_key or not nearest):
        return f"it is a key of the section {sections[0]}"
    return f"did you mean {nearest[0]!r}?" if nearest else f"valid are {', '.join(valid)}"


def members(type_: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type alone."""
    return typing.get_args(type_) if typing.get_origin(type_) in (types.UnionType, typing.Union) else (type_,)


def _value(node: yaml.Node, hint: Any, path: Path, key: str) -> Any:
    """Return the value of a node as the type `hint` of its field."""
    options = members(hint)
    if isinstance(node, yaml.ScalarNode) and node.tag.startswith("tag:yaml.org,2002:"):
        if type(None) in options and not node.style and node.value.lower() in _NULLS:
            return None
        for option in options:
            try:
                return _scalar(node.value, option)
            except ValueError:
                continue
    elif isinstance(node, yaml.SequenceNode):
        entry_hint = next(
            (typing.get_args(option)[0] for option in options if typing.get_origin(option) is list), None
        )
        if entry_hint is not None:
            return [_value(entry, entry_hint, path, key) for entry in node.value]
    got = repr(node.value) if isinstance(node, yaml.ScalarNode) else "several values"
    raise ValueError(f"{_at(path, node)}: {key}: expected {in_words(hint)}, got {got}")


def _scalar(text: str, hint: Any) -> Any:
    """Return text as a value of a type.

    Raises:
        ValueError: if it is none.
    """
    if typing.get_origin(hint) is Literal and text in typing.get_args(hint):
        return text
    if hint is str:
        return text
    if hint is bool and text.lower() in (*_TRUE, *_FALSE):
        return text.lower() in _TRUE
    if hint is int:
        return int(text)
    if hint is float and math.isfinite(float(text)):
        return float(text)
    raise ValueError(text)


def in_words(type_: Any) -> str:
    """Describe the type of a value for an error: `int | None` is "a whole number or null"."""
    names = {str: "text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}
    options, described = members(type_), list[str]()
    for option in options:
        origin, parts = typing.get_origin(option), typing.get_args(option)
        if origin is Literal and len(options) == 1 and len(parts) > 1:
            described.append(f"one of {', '.join(parts)}")
        elif origin is Literal:
            described += parts
        elif origin is list:
            entries = typing.get_origin(parts[0]) or parts[0]
            kinds = {str: "a list such as [a, b]", dict: "a list of JSON objects"}
            described.append(kinds.get(entries, "a list of numbers"))
        elif origin is dict:
            described.append("a JSON object")
        else:
            described.append(names[option])
    return " or ".join([", ".join(described[:-1]), described[-1]] if len(described) > 1 else described)
