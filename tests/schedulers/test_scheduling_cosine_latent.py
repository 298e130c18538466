import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler

from dit_hf import CosineLatentScheduler
from dit_hf.sampling.sample import SCHEDULERS

TYPES = ["sample", "epsilon", "v_prediction"]


def alpha_bar(u, s=0.008):
    return math.cos((u + s) / (1 + s) * math.pi / 2) ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2


def ddim_like(scheduler):
    return DDIMScheduler.from_config(scheduler.config)


def fake_model(sample, t):
    """Return a smooth function of both, the same for every scheduler."""
    return torch.tanh(sample * 0.7 + math.sin(float(t) / 90)) * 0.9


def noise(shape=(2, 4, 8, 8), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loop(scheduler, steps, model=fake_model, start=None, **options):
    scheduler.set_timesteps(steps)
    sample = noise() if start is None else start
    for t in scheduler.timesteps:
        sample = scheduler.step(model(scheduler.scale_model_input(sample, t), t), t, sample, **options).prev_sample
    return sample


def test_levels_are_the_cosine_schedule():
    scheduler = CosineLatentScheduler()
    alpha, sigma = scheduler.levels(torch.arange(500.0))
    expected = torch.tensor([alpha_bar((t + 1) / 500) for t in range(499)], dtype=torch.float64)
    torch.testing.assert_close(alpha[:-1].double().square(), expected, rtol=1e-4, atol=1e-6)
    assert 0 < alpha[-1] < 1e-3
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(500))
    assert torch.equal(scheduler.betas, DDIMScheduler(500, beta_schedule="squaredcos_cap_v2").betas)


def test_fractional_levels_lie_on_the_schedule():
    alpha, _ = CosineLatentScheduler().levels(torch.tensor([0.5, 17.25, 300.9]))
    expected = torch.tensor([alpha_bar((t + 1) / 500) for t in (0.5, 17.25, 300.9)])
    torch.testing.assert_close(alpha.square(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_clean_latent_comes_back_at_every_level(prediction_type):
    scheduler = CosineLatentScheduler(prediction_type=prediction_type)
    timesteps = torch.arange(500)
    if prediction_type == "epsilon":
        timesteps = timesteps[scheduler.alphas_cumprod > 1e-3]
    clean, eps = noise((len(timesteps), 4, 4, 4)), noise((len(timesteps), 4, 4, 4), 1)
    noisy = scheduler.add_noise(clean, eps, timesteps)
    output = {"sample": clean, "epsilon": eps, "v_prediction": scheduler.get_velocity(clean, eps, timesteps)}
    back = scheduler.predict_original_sample(output[prediction_type], timesteps, noisy)
    assert (back - clean).abs().max() < 1e-5


def test_noise_and_velocity_are_diffusers():
    scheduler, stock = CosineLatentScheduler(), DDIMScheduler(500, beta_schedule="squaredcos_cap_v2")
    timesteps = torch.tensor([3, 470])
    clean, eps = noise(), noise(seed=1)
    torch.testing.assert_close(scheduler.add_noise(clean, eps, timesteps), stock.add_noise(clean, eps, timesteps))
    torch.testing.assert_close(
        scheduler.get_velocity(clean, eps, timesteps), stock.get_velocity(clean, eps, timesteps)
    )


@pytest.mark.parametrize("steps", [1, 25, 50, 500])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_ddim_is_diffusers_over_a_full_loop(prediction_type, steps):
    scheduler = CosineLatentScheduler(prediction_type=prediction_type, multistep=False)
    assert (loop(scheduler, steps) - loop(ddim_like(scheduler), steps)).abs().max() < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 500])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_the_second_order_is_diffusers_dpm_solver_over_a_full_loop(prediction_type, steps):
    scheduler = CosineLatentScheduler(prediction_type=prediction_type)
    stock = DPMSolverMultistepScheduler.from_config(scheduler.config)
    assert stock.config.solver_order == 2
    assert (loop(scheduler, steps) - loop(stock, steps)).abs().max() < 2e-4


def gaussian(scheduler):
    """Return the perfect denoiser of N(0.5, 0.6^2), in closed form."""

    def denoiser(sample, t):
        alpha, sigma = scheduler.levels(torch.as_tensor(float(t)))
        clean = 0.5 + alpha * 0.36 / (alpha**2 * 0.36 + sigma**2) * (sample - alpha * 0.5)
        eps = (sample - alpha * clean) / sigma
        velocity = alpha * eps - sigma * clean
        return {"sample": clean, "epsilon": eps, "v_prediction": velocity}[scheduler.config.prediction_type]

    return denoiser


def test_the_second_order_is_much_more_accurate_in_the_same_steps():
    errors = []
    for multistep in (False, True):
        scheduler = CosineLatentScheduler(multistep=multistep)
        out = loop(scheduler, 20, gaussian(scheduler), noise((16, 4, 32, 32)))
        errors.append(abs(out.std().item() - 0.6))
    assert errors[1] < errors[0] / 4


def test_a_step_that_does_not_follow_the_previous_one_is_of_the_first_order():
    """After a jump and at the start of a new loop earlier predictions have no effect."""
    scheduler, ddim = CosineLatentScheduler(), CosineLatentScheduler(multistep=False)
    for one in (scheduler, ddim):
        one.set_timesteps(10)

    def step(one, index, seed):
        return one.step(noise(seed=seed), one.timesteps[index], noise(seed=9)).prev_sample

    for index in (0, 1, 2):
        step(scheduler, index, index)
    assert not torch.equal(step(scheduler, 3, 3), step(ddim, 3, 3))
    assert torch.equal(step(scheduler, 1, 4), step(ddim, 1, 4))  # back
    assert torch.equal(step(scheduler, 5, 5), step(ddim, 5, 5))  # ahead
    scheduler.set_timesteps(10)
    assert torch.equal(step(scheduler, 6, 6), step(ddim, 6, 6))  # a new loop
    step(scheduler, 8, 7)
    assert torch.equal(step(scheduler, 9, 8), step(ddim, 9, 8))  # to the clean latent


def test_stochastic_ddim_is_diffusers_over_a_full_loop():
    scheduler = CosineLatentScheduler(multistep=False)
    ours = loop(scheduler, 25, eta=1.0, generator=torch.Generator().manual_seed(3))
    theirs = loop(ddim_like(scheduler), 25, eta=1.0, generator=torch.Generator().manual_seed(3))
    assert (ours - theirs).abs().max() < 1e-4


CHECKSUM = 211.2720


def test_full_loop_checksum():
    out = loop(CosineLatentScheduler(prediction_type="v_prediction", multistep=False), 20)
    assert out.abs().sum().item() == pytest.approx(CHECKSUM, rel=1e-3)


@pytest.mark.parametrize("steps", [7, 25, 30])
def test_the_last_step_returns_the_clean_latent(steps):
    scheduler = CosineLatentScheduler()
    clean = noise(seed=5)
    assert torch.equal(loop(scheduler, steps, lambda sample, t: clean), clean)


def test_timesteps_are_trailing_and_evenly_spaced():
    scheduler = CosineLatentScheduler()
    scheduler.set_timesteps(25)
    stock = ddim_like(scheduler)
    stock.set_timesteps(25)
    assert torch.equal(scheduler.timesteps, stock.timesteps.float())
    scheduler.set_timesteps(30)
    assert scheduler.timesteps[0] == 499
    torch.testing.assert_close(scheduler.timesteps.diff(), torch.full((29,), -500 / 30))
    assert scheduler.init_noise_sigma == 1


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("stock", ["", *SCHEDULERS])
def test_stock_schedulers_sample_the_same_model(stock, prediction_type):
    """Every sampler that `dit-hf sample` offers must end near the distribution of the denoiser."""
    scheduler = CosineLatentScheduler(prediction_type=prediction_type)
    settings = SCHEDULERS.get(stock, {})
    sampler = getattr(diffusers, stock).from_config(scheduler.config, **settings) if stock else scheduler
    sampler.set_timesteps(50)
    start = noise((16, 4, 32, 32)) * sampler.init_noise_sigma
    out = loop(sampler, 50, gaussian(scheduler), start)
    assert out.mean().item() == pytest.approx(0.5, abs=0.03)
    assert out.std().item() == pytest.approx(0.6, abs=0.03)


def test_heun_needs_the_settings_of_sample():
    """Evenly spaced by timestep, its first step spans nearly all noise levels, and the result is far too wide."""
    scheduler, widths = CosineLatentScheduler(), []
    for settings in ({}, SCHEDULERS["HeunDiscreteScheduler"]):
        heun = HeunDiscreteScheduler.from_config(scheduler.config, **settings)
        heun.set_timesteps(25)
        start = noise((16, 4, 32, 32)) * heun.init_noise_sigma
        widths.append(loop(heun, 25, gaussian(scheduler), start).std().item())
    assert widths[0] > 0.7
    assert widths[1] == pytest.approx(0.6, abs=0.02)


def test_config_survives_saving(tmp_path):
    scheduler = CosineLatentScheduler(100, prediction_type="epsilon")
    scheduler.save_pretrained(tmp_path)
    loaded = CosineLatentScheduler.from_pretrained(tmp_path)
    assert loaded.config.trained_betas == scheduler.config.trained_betas
    assert torch.equal(loaded.betas, scheduler.betas)
    assert {scheduler.__name__ for scheduler in loaded.compatibles} == {"CosineLatentScheduler", *SCHEDULERS}


def test_other_betas_can_be_given():
    linear = torch.linspace(1e-4, 0.02, 1000)
    scheduler = CosineLatentScheduler(1000, trained_betas=linear.tolist())
    alpha, _ = scheduler.levels(torch.tensor([999.0]))
    assert alpha.square().item() == pytest.approx((1 - linear).prod().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CosineLatentScheduler(prediction_type="flow"), "prediction_type"),
        (lambda: CosineLatentScheduler(0), "num_train_timesteps=0 must be at least 1"),
        (lambda: CosineLatentScheduler(clip_sample=True), "clip_sample=False"),
        (lambda: CosineLatentScheduler(10, trained_betas=[0.1]), "10 numbers"),
        (lambda: CosineLatentScheduler().set_timesteps(501), "between 1 and 500"),
        (lambda: CosineLatentScheduler().step(noise(), 3, noise()), "set_timesteps"),
        (lambda: loop(CosineLatentScheduler(), 5, eta=2.0), "eta=2.0"),
    ],
)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
