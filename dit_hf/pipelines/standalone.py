"""The pipeline's code as one file of a repository, for loading without dit_hf installed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import ConfigMixin


def standalone_source(*parts: Callable[..., Any]) -> str:
    """Join the files of `parts` (classes and functions, in an order that imports allow) to one module.

    `from_pretrained(..., custom_pipeline="pipeline", trust_remote_code=True)` runs it, and it registers the model,
    scheduler and pipeline among `parts` with diffusers, as importing dit_hf does. A pipeline that was loaded so saves
    the same module again.
    """
    sources = [Path(file).read_text(encoding="utf-8") for file in dict.fromkeys(map(inspect.getfile, parts))]
    if len(sources) == 1:
        return sources[0]
    own = re.compile(r"^(# Copyright.*|from (__future__|\.\S+) import (\([^)]*\)|.*))\n", re.MULTILINE)
    registered = [part for part in parts if isinstance(part, type) and issubclass(part, ConfigMixin)]
    names = ", ".join(part.__name__ for part in registered)
    return (
        "# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.\n"
        "# Written by dit_hf when this pipeline was saved; it is not to be edited.\n"
        "from __future__ import annotations\n\nimport sys\n\nimport diffusers\n\n"
        + "\n\n".join(own.sub("", source).strip() + "\n" for source in sources)
        + '\n\nif "dit_hf" not in sys.modules:  # which has registered its own\n'
        f"    vars(diffusers).update({{kind.__name__: kind for kind in ({names})}})\n"
    )
