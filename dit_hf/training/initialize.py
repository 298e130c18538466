"""The transformer a run begins with: fresh, or with the weights of an earlier pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..config import Config
from ..latents.reader import LatentReader
from ..latents.vae import weights_sha256
from ..models.transformer_latent_dit import LatentDiTTransformer2DModel
from ..runs import Normalization, load_pipeline
from ..schedulers.scheduling_cosine_latent import CosineLatentScheduler


def build_transformer(
    config: Config, reader: LatentReader, say: Callable[[str], None] = print
) -> tuple[LatentDiTTransformer2DModel, Normalization]:
    """The transformer of a recipe, and mean and standard deviation by channel that its latents are normalised with.

    That the model of `model.init_from` knows latents of another VAE is told through `say`.

    Raises:
        ValueError: if sizes do not fit the cache, or the model of `model.init_from` does not fit the recipe.
    """
    torch.manual_seed(config.train.seed)
    channels, height, width = reader.latent_shape
    options: dict[str, Any] = {
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "conditions": reader.conditions,
        **config.model.sizes(),
    }
    if config.model.init_from is None:
        return LatentDiTTransformer2DModel(**options), cache_normalization(config, reader)
    try:
        earlier = load_pipeline(config.model.init_from, "cpu")
    except ValueError as error:
        raise ValueError(f"model.init_from {error}") from error
    prediction = earlier.scheduler.config.prediction_type
    if prediction != config.objective.prediction_type:
        raise ValueError(
            f"objective.prediction_type is {config.objective.prediction_type}, but {config.model.init_from} "
            f"(model.init_from) predicts {prediction}"
        )
    levels = CosineLatentScheduler(config.objective.num_train_timesteps, prediction_type=prediction)
    known = earlier.scheduler.betas
    if len(known) != len(levels.betas) or not torch.allclose(known, levels.betas, rtol=1e-4):
        raise ValueError(
            f"model.init_from {config.model.init_from} has {len(known)} noise levels of its own, which are not the "
            f"cosine schedule's {len(levels.betas)} (objective.num_train_timesteps)"
        )
    if earlier.vae is not None and weights_sha256(earlier.vae) != reader.info["vae_sha256"]:
        say(f"{config.model.init_from} (model.init_from) was trained on the latents of another VAE than these")
    before = earlier.transformer.config
    different = [
        f"{name} is {before[name]!r} there and {value!r} here"
        for name, value in options.items()
        if name not in ("sample_size", "conditions") and before[name] != value
    ]
    if earlier.transformer.out_channels != channels:
        different.append(f"out_channels is {earlier.transformer.out_channels} there and {channels} here")
    if different:
        raise ValueError(f"model.init_from {config.model.init_from} does not fit: {'; '.join(different)}")
    base = before.position_base_size or before.sample_size
    kept = {"timestep_freq_shift": before.timestep_freq_shift, "position_base_size": base}
    transformer = LatentDiTTransformer2DModel(**{**options, **kept})
    _take_weights(transformer, earlier.transformer)
    return transformer, (list(earlier.config.latents_mean), list(earlier.config.latents_std))


def cache_normalization(config: Config, reader: LatentReader) -> Normalization:
    """Mean and standard deviation by channel as `data.normalization` says."""
    info, channels = reader.info, reader.latent_shape[0]
    if config.data.normalization == "channel":
        return info["statistics"]["mean"], info["statistics"]["std"]
    return [info["shift_factor"]] * channels, [1 / info["scaling_factor"]] * channels


def _take_weights(transformer: LatentDiTTransformer2DModel, earlier: LatentDiTTransformer2DModel) -> None:
    """All weights of the earlier model; of the conditions those rows whose name and number of values are the same."""
    weights = transformer.state_dict()
    table = weights.pop("condition_embedding.weight", None)
    transformer.load_state_dict({name: earlier.state_dict()[name] for name in weights}, strict=False)
    if table is None or earlier.condition_embedding is None:
        return
    begins = dict(zip(earlier.config.conditions, earlier.condition_offsets.tolist(), strict=True))
    counts = transformer.config.conditions
    for (name, values), begin in zip(counts.items(), transformer.condition_offsets.tolist(), strict=True):
        if earlier.config.conditions.get(name) == values:
            rows = earlier.condition_embedding.weight[begins[name] : begins[name] + values + 1]
            table[begin : begin + values + 1] = rows.detach()
