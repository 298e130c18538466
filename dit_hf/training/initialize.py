"""Initialization of a run's transformer: random, or with the weights of an earlier model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import broadcast_object_list
from torch import nn

from ..config import LINEAR_TIMESTEPS, Config
from ..devices import on_first_rank
from ..latents.reader import LatentReader
from ..latents.vae import weights_sha256
from ..models.transformer_latent_dit import LatentDiTTransformer2DModel
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..runs import Normalization, build_scheduler, load_pipeline
from ..schedulers.scheduling_cosine_latent import named_betas


def build_transformer(
    config: Config, reader: LatentReader, log: Callable[[str], None] = print
) -> tuple[LatentDiTTransformer2DModel, Normalization]:
    """Build the transformer of a recipe, on the CPU.

    Args:
        config: The recipe; `model.init_from` names the earlier model, if there is one.
        reader: Of the training images.
        log: Receives a line if the earlier model has another VAE than the latents.

    Returns:
        The transformer, and mean and standard deviation by channel to normalize its latents with.

    Raises:
        ValueError: if sizes do not fit the cache, or the model of `model.init_from` does not fit the recipe.
    """
    # Seeded here, so that the random weights do not depend on anything that was sampled before.
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

    # An earlier model.
    try:
        earlier = load_pipeline(config.model.init_from, "cpu")
    except ValueError as error:
        raise ValueError(f"model.init_from {error}") from error
    _check_schedule(config, earlier)
    if earlier.vae is not None and weights_sha256(earlier.vae) != reader.info["vae_sha256"]:
        log(f"{config.model.init_from} (model.init_from) has another VAE than these latents; this run takes theirs")
    _check_sizes(config, options, earlier.transformer)

    # Keep what gives its weights their meaning: the scale of timesteps, and the size that positions refer to (they are
    # stretched where the cache has another resolution).
    before = earlier.transformer.config
    options["timestep_freq_shift"] = before.timestep_freq_shift
    options["position_base_size"] = before.position_base_size or before.sample_size
    transformer = LatentDiTTransformer2DModel(**options)
    _copy_weights(transformer, earlier.transformer)

    # Its normalization too, whatever the recipe says: its weights expect latents of that scale.
    return transformer, (list(earlier.config.latents_mean), list(earlier.config.latents_std))


def build_for_sharding(
    build: Callable[[], tuple[LatentDiTTransformer2DModel, Normalization]],
) -> tuple[LatentDiTTransformer2DModel, Normalization]:
    """Build a transformer that FSDP2 will shard: by `build` on the first rank, without its weights on the others.

    Their weights are allocated but never touched, so they take no memory: `prepare` frees them, and sends every rank
    its shards from the first one, if the setting `fsdp_cpu_ram_efficient_loading` is on. Call it on all ranks.
    """
    built = on_first_rank(build)
    ((config, normalization),) = broadcast_object_list([(dict(built[0].config), built[1]) if built else None])
    if built:
        return built
    with init_empty_weights(include_buffers=False):
        transformer = LatentDiTTransformer2DModel.from_config(config)
    for module in transformer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cpu"))
    return transformer, normalization


def _check_schedule(config: Config, earlier: LatentDiTPipeline) -> None:
    """Check that an earlier model predicts what the recipe trains, at the same noise levels.

    Raises:
        ValueError: if not.
    """
    prediction = earlier.scheduler.config.prediction_type
    if prediction != config.objective.prediction_type:
        raise ValueError(
            f"objective.prediction_type is {config.objective.prediction_type}, but {config.model.init_from} "
            f"(model.init_from) predicts {prediction}"
        )
    # With a tolerance: tables that other libraries computed are rounded in another way.
    expected, betas = build_scheduler(config.objective).betas, earlier.scheduler.betas
    if len(betas) != len(expected) or not torch.allclose(betas, expected, rtol=1e-4):
        raise ValueError(
            f"model.init_from {config.model.init_from} has {len(betas)} noise levels of its own, which are not the "
            f"{len(expected)} of the recipe (objective.num_train_timesteps, objective.beta_schedule){_options(betas)}"
        )


def _options(betas: torch.Tensor) -> str:
    """Return the options by which a recipe has these noise levels, as the end of a sentence; '' if none does."""
    for schedule, count in (("squaredcos_cap_v2", len(betas)), ("linear", LINEAR_TIMESTEPS)):
        if count == len(betas) and torch.allclose(betas, torch.tensor(named_betas(schedule, count)), rtol=1e-4):
            return f"; give --objective.num_train_timesteps {count} --objective.beta_schedule {schedule}"
    return ""


def _check_sizes(config: Config, options: dict[str, Any], earlier: LatentDiTTransformer2DModel) -> None:
    """Check that the weights of an earlier transformer fit one with `options`.

    Raises:
        ValueError: naming every option that differs.
    """
    # The sizes of images and the conditions may differ, see `build_transformer` and `_copy_weights`.
    different = [
        f"{name} is {earlier.config[name]!r} there and {value!r} here"
        for name, value in options.items()
        if name not in ("sample_size", "conditions") and earlier.config[name] != value
    ]
    # Twice as many channels come out where a variance is learned, which `_copy_weights` drops.
    channels = options["in_channels"]
    if earlier.out_channels not in (channels, 2 * channels):
        different.append(f"out_channels is {earlier.out_channels} there and {channels} here")
    if different:
        raise ValueError(f"model.init_from {config.model.init_from} does not fit: {'; '.join(different)}")


def cache_normalization(config: Config, reader: LatentReader) -> Normalization:
    """Return mean and standard deviation by channel of a new run's latents, by `data.normalization`."""
    info, channels = reader.info, reader.latent_shape[0]
    if config.data.normalization == "channel":
        return info["statistics"]["mean"], info["statistics"]["std"]
    # diffusers multiplies by the VAE's scaling factor; here latents are divided by a standard deviation.
    return [info["shift_factor"]] * channels, [1 / info["scaling_factor"]] * channels


def _copy_weights(transformer: LatentDiTTransformer2DModel, earlier: LatentDiTTransformer2DModel) -> None:
    """Copy the weights of an earlier model; of the conditions, those with the same name and number of values."""
    # All but the conditions' table, and of the output only the latents: a learned variance stands behind them.
    weights = transformer.state_dict()
    table = weights.pop("condition_embedding.weight", None)
    copied = {name: earlier.state_dict()[name] for name in weights}
    channels, ratio = transformer.out_channels, earlier.out_channels // transformer.out_channels
    for name in ("proj_out.weight", "proj_out.bias"):  # of rows [patch, patch, channels]
        copied[name] = copied[name].unflatten(0, (-1, ratio * channels))[:, :channels].flatten(0, 1)
    transformer.load_state_dict(copied, strict=False)
    if earlier.condition_embedding is None:
        return

    # The table holds the rows of one condition after the other: its values, then its null. Conditions may stand in
    # another order than before; new ones keep their random rows. `table` shares the model's memory.
    first_rows = dict(zip(earlier.config.conditions, earlier.condition_offsets.tolist(), strict=True))
    before, counts = earlier.condition_embedding.weight.detach(), transformer.config.conditions or {}
    for name, values in earlier.config.conditions.items():
        rows = before[first_rows[name] : first_rows[name] + values + 1]
        if table is not None and counts.get(name) == values:
            first = int(transformer.condition_offsets[list(counts).index(name)])
            table[first : first + values + 1] = rows
        else:
            # Its null goes on in the bias that conditions are added to, so that nothing changes without conditions.
            transformer.time_embedding.linear_2.bias.data += rows[-1]
