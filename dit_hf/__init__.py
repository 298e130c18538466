"""dit_hf: train, sample and share latent Diffusion Transformers in the Hugging Face ecosystem."""

import diffusers

from .data.images import open_images
from .models.transformer_latent_dit import LatentDiTTransformer2DModel
from .pipelines.pipeline_latent_dit import LatentDiTPipeline
from .schedulers.scheduling_cosine_latent import CosineLatentScheduler

__version__ = "0.1.0"
__all__ = ["CosineLatentScheduler", "LatentDiTPipeline", "LatentDiTTransformer2DModel", "open_images"]

# diffusers looks the classes of a saved pipeline up in its own module; there a plain `from_pretrained` finds ours.
for _class in (CosineLatentScheduler, LatentDiTPipeline, LatentDiTTransformer2DModel):
    setattr(diffusers, _class.__name__, _class)
