"""Whether a scheduler samples the right distribution in a number of steps, measured where it is known."""

from __future__ import annotations

import copy
import inspect
import logging
import operator
import weakref
from typing import Any

import torch
from diffusers.schedulers import DDIMScheduler

from .scheduling_cosine_latent import CosineLatentScheduler

logger = logging.getLogger(__name__)

# The distribution that is sampled: normal in every latent, so that its perfect denoiser is known.
MEAN, STD = 0.5, 0.6
# How far the deviation may be off: of a first-order solver beyond DDIM's own error, of another one at all.
FIRST_ORDER_TOLERANCE, TOLERANCE = 0.01, 0.1
# From here on images are broken, unless DDIM's are too.
BROKEN = 0.3

# The checked numbers of steps of each scheduler.
_checked: weakref.WeakKeyDictionary[Any, set[int]] = weakref.WeakKeyDictionary()


def check_num_inference_steps(scheduler: Any, num_inference_steps: int) -> None:
    """Check that a scheduler can sample in this number of steps; a loss of accuracy is reported once.

    Of another scheduler than a [`CosineLatentScheduler`] it is measured, by sampling a distribution that is known.

    Raises:
        ValueError: for less than one step or more than there are timesteps, and for a scheduler that fails, leaves the
            timesteps that models learn, or ends far from the distribution.
    """
    name = type(scheduler).__name__
    total = scheduler.config.num_train_timesteps
    try:
        steps = operator.index(num_inference_steps)
    except TypeError:
        steps = 0
    if not 1 <= steps <= total:
        raise ValueError(f"num_inference_steps={num_inference_steps!r} must be a whole number between 1 and {total}")
    if isinstance(scheduler, CosineLatentScheduler) or steps in _checked.get(scheduler, ()):
        return
    place = f"{name} with num_inference_steps={steps}"
    advice = "the pipeline's own scheduler takes any number: CosineLatentScheduler.from_config(pipe.scheduler.config)"
    if not isinstance(getattr(scheduler, "betas", None), torch.Tensor):
        raise ValueError(f"{name} does not sample such a model: it has no betas; {advice}")
    if isinstance(scheduler, DDIMScheduler) and total % steps:
        # It takes the end of each step to be `timestep - total // steps`.
        raise ValueError(f"{place} is wrong, since that does not divide {total}; {advice}")
    own = CosineLatentScheduler(
        total,
        prediction_type=scheduler.config.prediction_type,
        trained_betas=scheduler.betas.tolist(),
        multistep=False,
    )
    try:
        mean, std = sampled_distribution(scheduler, own, steps)
    except Exception as error:  # whatever index or assertion fails in it
        raise ValueError(f"{place} fails ({type(error).__name__} {error}); {advice}") from error
    _compare(place, advice, (mean, std), sampled_distribution(own, own, steps), _order(scheduler))
    _checked.setdefault(scheduler, set()).add(steps)


def schedule_of(scheduler: Any) -> tuple[str, tuple[float, ...]] | None:
    """Return what a model must have been trained on: prediction type and betas; None for a scheduler without."""
    betas = getattr(scheduler, "betas", None)
    if not isinstance(betas, torch.Tensor):
        return None
    return scheduler.config.prediction_type, tuple(betas.tolist())


def sampled_distribution(
    scheduler: Any, levels: CosineLatentScheduler, num_inference_steps: int
) -> tuple[float, float]:
    """Return the mean and deviation that a scheduler samples instead of `MEAN` and `STD`, with the perfect denoiser.

    Args:
        scheduler: Is copied, so that its state stays.
        levels: The noise levels that timesteps stand for, and what is to be predicted.
        num_inference_steps: The number of steps.

    Raises:
        ValueError: if a timestep is below 0.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    if (scheduler.timesteps < 0).any():
        raise ValueError("a timestep is below 0")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(0)

    # The quantiles of noise: a deterministic step keeps their order, so that few give the exact deviation.
    count = 1024
    sample = torch.special.ndtri((torch.arange(count) + 0.5) / count).reshape(1, 1, 32, 32)
    sample = sample * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(sample, t)
        alpha, sigma = levels.levels(t.float())
        clean = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (model_input - alpha * MEAN)
        noise = (model_input - alpha * clean) / sigma
        kinds = {"sample": clean, "epsilon": noise, "v_prediction": alpha * noise - sigma * clean}
        output = kinds[levels.config.prediction_type]
        sample = scheduler.step(output, t, sample, **options, return_dict=False)[0]
    return sample.mean().item(), sample.std().item()


def _order(scheduler: Any) -> int:
    """Return the order of a solver; multistep ones have it in their config."""
    return max(scheduler.order, scheduler.config.get("solver_order", 1))


def _compare(place: str, advice: str, found: tuple[float, float], ddim: tuple[float, float], order: int) -> None:
    """Report a sampled mean and deviation that are further off than DDIM's."""
    error, expected_error = (abs(mean - MEAN) + abs(std - STD) for mean, std in (found, ddim))
    tolerance = expected_error + FIRST_ORDER_TOLERANCE
    if order > 1:
        tolerance = max(tolerance, TOLERANCE)
    if error <= tolerance:  # not so if it is not a number
        return
    problem = f"{place} samples a deviation of {found[1]:.2f} where {STD:.2f} is right and DDIM has {ddim[1]:.2f}"
    if not error <= max(BROKEN, tolerance):
        raise ValueError(f"{problem}; {advice}")
    logger.warning(f"{problem}; more steps or other sigmas are more accurate")
