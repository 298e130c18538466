"""The card of what is pushed from Python, in place of the empty one that diffusers writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_HEAD = """---
library_name: diffusers
{metadata}---

# {repo_id}

"""
_LICENSE = """
No license is stated: add `license:` to the metadata of this file.
"""

PIPELINE_CARD = (
    _HEAD.replace("{metadata}", "pipeline_tag: unconditional-image-generation\n")
    + """A latent Diffusion Transformer, pushed from Python by dit_hf. This loads it by the code in the repository:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", custom_pipeline="pipeline", trust_remote_code=True)
```

With dit_hf installed, `import dit_hf` and `DiffusionPipeline.from_pretrained("{repo_id}")` are enough. For images,
masks and edits: `ModularPipeline.from_pretrained("{repo_id}", trust_remote_code=True)`.
"""
    + _LICENSE
)


def _snippet(variable: str, kind: str) -> str:
    # Built, because diffusers takes lines of a repository's code for imports wherever they stand.
    return f'\n```python\nfrom dit_hf import {kind}\n\n{variable} = {kind}.from_pretrained("{{repo_id}}")\n```\n'


TRANSFORMER_CARD = (
    _HEAD.replace("{metadata}", "")
    + """The transformer of a latent Diffusion Transformer (https://arxiv.org/abs/2212.09748), pushed from Python by
dit_hf; the VAE and the scheduler that it was trained with are not in it. With dit_hf installed, this loads it:
"""
    + _snippet("transformer", "LatentDiTTransformer2DModel")
    + """
`config.json` names the conditions, the size of the latents and the shape of the network.
"""
    + _LICENSE
)
SCHEDULER_CARD = (
    _HEAD.replace("{metadata}", "")
    + """A scheduler of a latent Diffusion Transformer, pushed from Python by dit_hf; it has no weights. With dit_hf
installed, this loads it:
"""
    + _snippet("scheduler", "CosineLatentScheduler")
)


class ShortCardMixin:
    """Push with a short card that says what is in the repository and how to load it."""

    _card: str  # one of the texts above

    def _upload_folder(self, working_dir: str | os.PathLike, repo_id: str, **options: Any) -> Any:
        """Upload a folder by diffusers' private method of 0.42.1; its empty card is replaced, one of a user kept."""
        card = Path(working_dir) / "README.md"
        if card.is_file() and "This model card has been automatically generated" in card.read_text(encoding="utf-8"):
            card.write_text(self._card.replace("{repo_id}", repo_id), encoding="utf-8")
        return super()._upload_folder(working_dir, repo_id, **options)  # type: ignore[misc]
