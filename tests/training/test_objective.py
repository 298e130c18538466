import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm, randint

from dit_hf import CosineLatentScheduler
from dit_hf.config import ObjectiveConfig
from dit_hf.training.objective import (
    loss_weights,
    losses,
    sample_flips,
    sample_step_randomness,
    training_target,
)

SHAPE = (64, 4, 8, 8)


def sample(step=0, seed=0, config=None, conditions=6):
    return sample_step_randomness(config or ObjectiveConfig(), seed, step, SHAPE, conditions, torch.device("cpu"))


def test_random_numbers_are_a_function_of_seed_and_step():
    for name in ("timesteps", "noise", "posterior_noise", "keep"):
        assert torch.equal(getattr(sample(), name), getattr(sample(), name))
        assert not torch.equal(getattr(sample(), name), getattr(sample(step=1), name))
        assert not torch.equal(getattr(sample(), name), getattr(sample(seed=1), name))
    assert np.array_equal(sample_flips(0, 5, 64), sample_flips(0, 5, 64))
    assert 0 < sample_flips(0, 5, 64).sum() < 64


def test_slices_are_those_of_the_whole_batch():
    whole, part = sample(), sample()[slice(16, 32)]
    assert torch.equal(part.noise, whole.noise[16:32])
    assert torch.equal(part.keep, whole.keep[16:32])


def test_timesteps_are_uniform_and_noise_is_normal():
    many = [sample(step) for step in range(200)]
    timesteps = torch.cat([d.timesteps for d in many])
    assert timesteps.min() == 0
    assert timesteps.max() == 499
    assert timesteps.mean().item() == pytest.approx(249.5, abs=5)
    noise = torch.cat([d.noise for d in many])
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    correlation = (noise * torch.cat([d.posterior_noise for d in many])).mean().item()
    assert correlation == pytest.approx(0, abs=0.01)


def test_logit_normal_timesteps_make_the_ratio_of_noise_to_signal_log_normal():
    config = ObjectiveConfig(timestep_sampling="logit_normal", logit_mean=-0.5, logit_std=1.2)
    timesteps = torch.cat([sample(step, config=config).timesteps for step in range(200)])
    assert timesteps.min() >= 0
    assert timesteps.max() <= 499
    alpha, sigma = CosineLatentScheduler().levels(timesteps)
    fit = kstest((sigma / alpha).log().numpy(), norm(-0.5, 1.2).cdf)
    assert fit.statistic < 0.02  # levels are discrete, and the cosine's begin at 0.008
    uniform = kstest(torch.cat([sample(step).timesteps for step in range(200)]).numpy(), randint(0, 500).cdf)
    assert uniform.statistic < 0.02


def test_conditions_are_dropped_as_often_as_configured():
    keep = torch.cat([sample(step, config=ObjectiveConfig(condition_dropout=0.2)).keep for step in range(200)])
    none, full = (~keep.any(1)).float().mean().item(), keep.all(1).float().mean().item()
    # An image in the partial fifth keeps nothing (or everything) with probability 1/7 of that fifth.
    assert none == pytest.approx(0.2 + 0.2 / 7, abs=0.02)
    assert full == pytest.approx(0.6 + 0.2 / 7, abs=0.02)
    assert sample(config=ObjectiveConfig(condition_dropout=0.0)).keep.all()


def test_targets_by_the_closed_forms():
    clean, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    timesteps = torch.tensor([0.0, 200.0, 499.0])
    angle = torch.atan2(*reversed(CosineLatentScheduler().levels(timesteps))).view(-1, 1, 1, 1)
    expected = {"sample": clean, "v_prediction": angle.cos() * noise - angle.sin() * clean}
    for prediction_type, target in expected.items():
        scheduler = CosineLatentScheduler(prediction_type=prediction_type)
        torch.testing.assert_close(training_target(scheduler, clean, noise, timesteps), target, atol=1e-6, rtol=1e-5)


def test_min_snr_weighs_the_clean_latents_error_the_same_for_every_prediction():
    """Whatever is predicted, the weighted error must be min(SNR, 5) times the error of the clean latent it implies."""
    timesteps = torch.tensor([10.0, 150.0, 250.0, 400.0])
    alpha, sigma = CosineLatentScheduler().levels(timesteps)
    expected = (alpha / sigma).square().clamp(max=5.0)
    clean, noise, error = (torch.randn(4, 4, 2, 2, generator=torch.Generator().manual_seed(s)) for s in range(3))
    for prediction_type in ("sample", "v_prediction"):
        scheduler = CosineLatentScheduler(prediction_type=prediction_type)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = training_target(scheduler, clean, noise, timesteps)
        prediction = target + 0.1 * error
        implied = scheduler.predict_original_sample(prediction, timesteps, noisy)
        weighted = losses(prediction, target, loss_weights(scheduler, timesteps, 5.0), "l2")
        torch.testing.assert_close(
            weighted, expected * (implied - clean).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-7
        )
    assert torch.equal(loss_weights(scheduler, timesteps, None), torch.ones(4))


def test_soft_min_snr_is_below_min_snr_and_nears_it_far_from_the_corner():
    timesteps = torch.tensor([2.0, 100.0, 200.0, 400.0, 490.0])
    for prediction_type in ("sample", "v_prediction"):
        scheduler = CosineLatentScheduler(prediction_type=prediction_type)
        hard, soft = (loss_weights(scheduler, timesteps, 5.0, kind) for kind in ("min", "soft_min"))
        alpha, sigma = scheduler.levels(timesteps)
        # 1 / (sigma² + 1/gamma) of a schedule that preserves the signal, whose sigma is our sigma / alpha.
        ratio = (sigma / alpha).square()
        torch.testing.assert_close(soft / hard, 1 / (ratio + 0.2) / (1 / ratio).clamp(max=5.0))
        assert (soft < hard).all()
        assert (soft / hard)[[0, -1]].min() > 0.98


def test_pseudo_huber_is_l2_for_small_errors_and_l1_for_large_ones():
    target, ones = torch.zeros(1, 4, 2, 2), torch.ones(1)
    small, large = torch.full_like(target, 1e-3), torch.full_like(target, 100.0)
    assert losses(small, target, ones, "huber", 0.1).item() == pytest.approx(1e-6, rel=1e-3)
    assert losses(large, target, ones, "huber", 0.1).item() == pytest.approx(2 * 0.1 * 100, rel=2e-3)


def test_losses_are_a_mean_for_each_latent():
    prediction, target = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    weights = torch.tensor([1.0, 3.0])
    for kind, power in (("l1", 1), ("l2", 2)):
        expected = weights * (prediction - target).abs().pow(power).mean((1, 2, 3))
        torch.testing.assert_close(losses(prediction, target, weights, kind), expected)
