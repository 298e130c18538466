"""The pipeline's code as one file of a repository, for loading without dit_hf installed."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from diffusers.configuration_utils import ConfigMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

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


def __dir__() -> list[str]:
    # diffusers looks here for the one pipeline of a repository: not for those that are made of its parts.
    return [name for name in globals() if name not in ({made_of_parts})]
"""


def standalone_source() -> str:
    """Return one module that consists of the file of the blocks and of those that it imports from the package.

    `DiffusionPipeline.from_pretrained(..., custom_pipeline="pipeline", trust_remote_code=True)` runs it, and so does
    `ModularPipeline.from_pretrained(..., trust_remote_code=True)`. Like importing dit_hf, it registers the models,
    schedulers, pipelines and blocks in these files with diffusers. What is loaded from it saves the same module again.
    """
    # 1. The files. All is in one if this code runs from such a module, which is then written as it is.
    if __name__ != "dit_hf.pipelines.standalone":
        return _source(sys.modules[__name__])
    modules = _with_imports(sys.modules["dit_hf.pipelines.modular_blocks"])
    sources = [_source(module) for module in modules]

    # 2. Remove the copyright notices, which one at the head replaces, and all imports from the package.
    own = re.compile(r"^(# Copyright.*|from (__future__|\.\S+) import (\([^)]*\)|.*))\n", re.MULTILINE)

    # 3. Join them, and register what is saved with a config, unless dit_hf is imported and has registered its own.
    kinds = [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, ConfigMixin) and value.__module__ == module.__name__
    ]
    names = ", ".join(kind.__name__ for kind in kinds)
    made_of_parts = ", ".join(
        f'"{kind.__name__}"' for kind in kinds if issubclass(kind, DiffusionPipeline) and kind.__base__ in kinds
    )
    code = "\n\n".join(own.sub("", source).strip() + "\n" for source in sources)
    return "\n".join(
        [NOTICE + CODE_HEAD, code, CODE_TAIL.replace("{names}", names).replace("{made_of_parts}", made_of_parts)]
    )


def _with_imports(module: ModuleType) -> list[ModuleType]:
    """Return the modules that a module imports from the package, which it does by relative names, and itself last."""
    modules: dict[ModuleType, None] = {}
    for name in re.findall(r"^from (\.\S+) import", _source(module), re.MULTILINE):
        imported = sys.modules[importlib.util.resolve_name(name, module.__package__)]
        modules |= dict.fromkeys(_with_imports(imported))
    return [*modules, module]


def _source(module: ModuleType) -> str:
    return Path(str(module.__file__)).read_text(encoding="utf-8")
