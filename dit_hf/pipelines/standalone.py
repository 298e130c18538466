"""The pipeline's code as one file of a repository, for loading without dit_hf installed."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from diffusers.configuration_utils import ConfigMixin

CODE_FILE = "pipeline.py"
NOTICE = "# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.\n"
OLDEST_DIFFUSERS = "0.35.0"

CODE_HEAD = f"""# Written by dit_hf when this pipeline was saved; it is not to be edited.
from __future__ import annotations

import sys

import diffusers
from packaging.version import Version

if Version(diffusers.__version__) < Version("{OLDEST_DIFFUSERS}"):
    raise ImportError(
        "this pipeline needs diffusers {OLDEST_DIFFUSERS} or newer, and " + diffusers.__version__ + " is installed: "
        "pip install -U diffusers"
    )
"""
CODE_TAIL = """if "dit_hf" not in sys.modules:  # which has registered its own
    vars(diffusers).update({kind.__name__: kind for kind in ({names})})
"""


def standalone_source(pipeline_class: type) -> str:
    """Return one module that consists of the file of a class and of those that it imports from the package.

    `from_pretrained(..., custom_pipeline="pipeline", trust_remote_code=True)` runs it. Like importing dit_hf, it
    registers the models, schedulers and pipelines in these files with diffusers. A pipeline loaded from it saves the
    same module again.
    """
    # 1. The files. All is in one if this code runs from such a module, which is then written as it is.
    modules = _with_imports(sys.modules[pipeline_class.__module__])
    sources = [_source(module) for module in modules]
    if len(sources) == 1:
        return sources[0]

    # 2. Remove the copyright notices, which one at the head replaces, and all imports from the package.
    own = re.compile(r"^(# Copyright.*|from (__future__|\.\S+) import (\([^)]*\)|.*))\n", re.MULTILINE)

    # 3. Join them, and register what is saved with a config, unless dit_hf is imported and has registered its own.
    names = ", ".join(
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, ConfigMixin) and value.__module__ == module.__name__
    )
    code = "\n\n".join(own.sub("", source).strip() + "\n" for source in sources)
    return "\n".join([NOTICE + CODE_HEAD, code, CODE_TAIL.replace("{names}", names)])


def _with_imports(module: ModuleType) -> list[ModuleType]:
    """Return the modules that a module imports from the package, which it does by relative names, and itself last."""
    modules: dict[ModuleType, None] = {}
    for name in re.findall(r"^from (\.\S+) import", _source(module), re.MULTILINE):
        imported = sys.modules[importlib.util.resolve_name(name, module.__package__)]
        modules |= dict.fromkeys(_with_imports(imported))
    return [*modules, module]


def _source(module: ModuleType) -> str:
    return Path(str(module.__file__)).read_text(encoding="utf-8")
