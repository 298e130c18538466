"""The pipeline's code as one file of a repository, for loading without dit_hf installed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import ConfigMixin

CODE_FILE = "pipeline.py"
_NOTICE = "# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.\n"

_CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
---

# {repo_id}

A latent Diffusion Transformer, pushed from Python by dit_hf. This loads it by the code in the repository:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", custom_pipeline="pipeline", trust_remote_code=True)
```

With dit_hf installed, `import dit_hf` and `DiffusionPipeline.from_pretrained("{repo_id}")` are enough.
"""


def check_target(folder: Path, with_card: bool = False) -> None:
    """Check that a pipeline saved to `folder`, `with_card` or without, replaces nothing but a pipeline of ours.

    Raises:
        FileExistsError: if it would.
    """
    code, index = folder / CODE_FILE, folder / "model_index.json"
    if code.is_file() and not code.read_bytes().startswith(_NOTICE.encode()):
        raise FileExistsError(f"{folder} holds a {CODE_FILE} of something else; name a new folder")
    if index.is_file() and "LatentDiT" not in index.read_text(encoding="utf-8", errors="replace"):
        raise FileExistsError(f"{folder} holds another pipeline ({index.name}); name a new folder")
    if with_card and (folder / "README.md").is_file() and not index.is_file():
        raise FileExistsError(f"{folder} holds a README.md, which the card would replace; name a new folder")


def write_short_card(folder: Path, repo_id: str) -> None:
    """Replace the empty card that diffusers writes for a repository by one that says how to load it."""
    card = folder / "README.md"
    if card.is_file() and "This model card has been automatically generated" in card.read_text(encoding="utf-8"):
        card.write_text(_CARD.format(repo_id=repo_id), encoding="utf-8")


def standalone_source(*parts: Callable[..., Any]) -> str:
    """Return one module that consists of the files of all `parts`.

    `from_pretrained(..., custom_pipeline="pipeline", trust_remote_code=True)` runs it. Like importing dit_hf, it
    registers the model, scheduler and pipeline among `parts` with diffusers. A pipeline loaded from it saves the same
    module again.

    Args:
        parts: A class or function of each file, in the order of their imports. All that the files import from the
            package must be among them, and the imports must be relative, because they are removed.
    """
    # 1. Read the files. All parts are in one if this code runs from such a module, which is then written as it is.
    sources = [Path(file).read_text(encoding="utf-8") for file in dict.fromkeys(map(inspect.getfile, parts))]
    if len(sources) == 1:
        return sources[0]

    # 2. Remove the copyright notices, which one at the head replaces, and all imports from the package.
    own = re.compile(r"^(# Copyright.*|from (__future__|\.\S+) import (\([^)]*\)|.*))\n", re.MULTILINE)

    # 3. Join them, and register what is saved with a config, unless dit_hf is imported and has registered its own.
    registered = [part for part in parts if isinstance(part, type) and issubclass(part, ConfigMixin)]
    names = ", ".join(part.__name__ for part in registered)
    return (
        _NOTICE + "# Written by dit_hf when this pipeline was saved; it is not to be edited.\n"
        "from __future__ import annotations\n\nimport sys\n\nimport diffusers\n\n"
        + "\n\n".join(own.sub("", source).strip() + "\n" for source in sources)
        + '\n\nif "dit_hf" not in sys.modules:  # which has registered its own\n'
        f"    vars(diffusers).update({{kind.__name__: kind for kind in ({names})}})\n"
    )
