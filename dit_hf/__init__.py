"""dit_hf: train, sample and share latent Diffusion Transformers in the Hugging Face ecosystem."""

import importlib
from typing import TYPE_CHECKING, Any

from .versions import check_versions

check_versions()  # before anything is imported that another version may not have

# ruff: noqa: E402
import diffusers

from .data.images import describe_source, open_images
from .models.transformer_latent_dit import LatentDiTTransformer2DModel
from .pipelines.modular_blocks import LatentDiTAutoBlocks
from .pipelines.pipeline_latent_dit import LatentDiTPipeline
from .pipelines.pipeline_latent_dit_edit import LatentDiTEditPipeline
from .pipelines.pipeline_latent_dit_img2img import LatentDiTImg2ImgPipeline
from .pipelines.pipeline_latent_dit_inpaint import LatentDiTInpaintPipeline
from .schedulers.scheduling_cosine_latent import CosineLatentScheduler

if TYPE_CHECKING:
    from .evaluation.evaluate import evaluate
    from .latents.prepare import prepare_latents
    from .training.trainer import train

__version__ = "0.1.0"
__all__ = [
    "CosineLatentScheduler",
    "LatentDiTAutoBlocks",
    "LatentDiTEditPipeline",
    "LatentDiTImg2ImgPipeline",
    "LatentDiTInpaintPipeline",
    "LatentDiTPipeline",
    "LatentDiTTransformer2DModel",
    "describe_source",
    "evaluate",
    "open_images",
    "prepare_latents",
    "train",
]
# What only some programs need and takes seconds to import.
_LAZY = {"evaluate": ".evaluation.evaluate", "prepare_latents": ".latents.prepare", "train": ".training.trainer"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dit_hf' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name], __name__), name)


# diffusers looks up the classes of a saved pipeline in its own module: with ours there, `from_pretrained` finds them.
for _class in (
    CosineLatentScheduler,
    LatentDiTAutoBlocks,
    LatentDiTEditPipeline,
    LatentDiTImg2ImgPipeline,
    LatentDiTInpaintPipeline,
    LatentDiTPipeline,
    LatentDiTTransformer2DModel,
):
    setattr(diffusers, _class.__name__, _class)
