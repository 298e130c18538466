"""What of a pipeline is saved: its parts, its index and its code for loading without dit_hf."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

from ..short_card import PIPELINE_CARD, ShortCardMixin
from .standalone import CODE_FILE, NOTICE, standalone_source

INDEX = "model_index.json"
MODULAR_CONFIG = "modular_config.json"
# Where diffusers finds the blocks of a modular pipeline.
BLOCKS = {"_class_name": "LatentDiTAutoBlocks", "auto_map": {"ModularPipelineBlocks": "pipeline.LatentDiTAutoBlocks"}}


class LatentDiTSavingMixin(ShortCardMixin):
    """diffusers' saving of a pipeline, as one that loads with and without dit_hf; others' files are kept."""

    _card = PIPELINE_CARD
    transformer: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load a pipeline; see diffusers.

        Raises:
            OSError: if there is no pipeline; for the folder of a run it names the one in it.
        """
        folder = Path(pretrained_model_name_or_path)
        if not (folder / INDEX).is_file() and (folder / "pipeline" / INDEX).is_file():
            raise OSError(f"{folder} is the folder of a run: its pipeline is in {folder / 'pipeline'}")
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]

    @property
    def components(self) -> dict[str, Any]:
        """All arguments of `__init__`, so that another pipeline made with them works on the same latents."""
        # Not by `super().parameters`, which diffusers has only from 0.36 on.
        names = inspect.signature(type(self).__init__).parameters
        config = {name: value for name, value in self.config.items() if name in names}  # type: ignore[attr-defined]
        return {**config, **super().components}  # type: ignore[misc]

    @property
    def parameters(self) -> dict[str, Any]:
        """An empty dict: the arguments that diffusers lists here are among the `components`."""
        return {}

    def to_json_string(self) -> str:
        """Return the index as JSON, with which `DiffusionPipeline.from_pretrained` works after `import dit_hf`.

        Subclasses write the index of a [`LatentDiTPipeline`] too, which loads without dit_hf as well.
        """
        index = json.loads(super().to_json_string())  # type: ignore[misc]
        index["_class_name"] = self._saved_class().__name__
        index.pop("_name_or_path", None)  # a path of this machine
        # diffusers looks for our classes in its own module, where importing dit_hf puts them.
        for name, value in index.items():
            if (
                isinstance(value, list)
                and len(value) == 2
                and str(value[0]).startswith(("dit_hf.", "diffusers_modules."))
            ):
                index[name] = ["diffusers", value[1]]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save the pipeline; see diffusers.

        Raises:
            ValueError: if the transformer has adapters, or is stored in fewer bits; see its `save_pretrained`.
            FileExistsError: if the folder holds a `pipeline.py` or `model_index.json` of something else, or with
                `push_to_hub` a `README.md`, which diffusers writes.
        """
        if self.transformer is not None:
            self.transformer.check_can_be_saved()
        _check_target(Path(save_directory), with_card=kwargs.get("push_to_hub", False))
        # As text, which diffusers takes the repository's name from.
        super().save_pretrained(str(Path(save_directory)), *args, **kwargs)  # type: ignore[misc]

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the index, and beside it `pipeline.py`, with which the pipeline loads without dit_hf.

        `modular_config.json` names the blocks in it, for `ModularPipeline.from_pretrained`, which then takes the parts
        from the index.

        Also remove from the configs of the components, which diffusers saves first, where they were loaded from.
        """
        folder = Path(save_directory)
        # 1. Paths of this machine do not belong into a folder that is published.
        for name in super().components:  # type: ignore[misc]
            for path in (folder / name / file for file in ("config.json", "scheduler_config.json")):
                config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
                if config.pop("_name_or_path", None) is not None:
                    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

        # 2. The index last, because its presence makes the folder a pipeline; it may also push the folder.
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CODE_FILE).write_text(standalone_source(), encoding="utf-8")
        (folder / MODULAR_CONFIG).write_text(json.dumps(BLOCKS, indent=2) + "\n", encoding="utf-8")
        super().save_config(save_directory, push_to_hub, **kwargs)  # type: ignore[misc]

    def _saved_class(self) -> type:
        """Return the class that an instance of it, or of a subclass, is saved as: the one that has this mixin."""
        return next(kind for kind in type(self).__mro__ if LatentDiTSavingMixin in kind.__bases__)


def _check_target(folder: Path, with_card: bool) -> None:
    """Check that a pipeline saved to `folder`, `with_card` or without, replaces nothing but a pipeline of ours.

    Raises:
        FileExistsError: if it would.
    """
    code, index = folder / CODE_FILE, folder / INDEX
    if code.is_file() and not code.read_bytes().startswith(NOTICE.encode()):
        raise FileExistsError(f"{folder} holds a {CODE_FILE} of something else; name a new folder")
    for path in (index, folder / MODULAR_CONFIG):
        if path.is_file() and "LatentDiT" not in path.read_text(encoding="utf-8", errors="replace"):
            raise FileExistsError(f"{folder} holds another pipeline ({path.name}); name a new folder")
    if with_card and (folder / "README.md").is_file() and not index.is_file():
        raise FileExistsError(f"{folder} holds a README.md, which the card would replace; name a new folder")
