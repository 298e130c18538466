"""Schedulers sample a known distribution in any number of steps, or say that they do not."""

import logging
import re
from pathlib import Path

import diffusers
import pytest
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from dit_hf import CosineLatentScheduler
from dit_hf.schedulers.accuracy import check_num_inference_steps, sampled_distribution

OWN = CosineLatentScheduler(prediction_type="v_prediction")
ROOT = Path(__file__).parents[2]
DOCS = [(ROOT / path).read_text(encoding="utf-8") for path in ("docs/editing.md", "benchmarks/README.md")]
MULTISTEP = [DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler]


def deviation(scheduler, steps):
    return sampled_distribution(scheduler, OWN, steps)[1]


def like(kind, **settings):
    return kind.from_config(OWN.config, **settings)


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "dit_hf")
    return lambda: [record.message for record in caplog.records if record.name.startswith("dit_hf")]


@pytest.mark.parametrize("steps", [1, 25, 30, 61, 75, 125, 250, 300, 500])
def test_ddim_is_ours_or_refused(steps):
    stock, ours = like(DDIMScheduler), like(CosineLatentScheduler, multistep=False)
    if 500 % steps:
        with pytest.raises(ValueError, match=f"num_inference_steps={steps} is wrong, since that does not divide 500"):
            check_num_inference_steps(stock, steps)
    else:
        check_num_inference_steps(stock, steps)
        assert deviation(stock, steps) == pytest.approx(deviation(ours, steps), abs=0.001)


@pytest.mark.parametrize("sigmas", ["use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas"])
@pytest.mark.parametrize("kind", MULTISTEP)
def test_other_sigmas_sample_the_distribution_in_25_steps(kind, sigmas, warnings):
    scheduler = like(kind, **{sigmas: True})
    check_num_inference_steps(scheduler, 25)
    assert not warnings()
    assert deviation(scheduler, 25) == pytest.approx(0.6, abs=0.1)


@pytest.mark.parametrize("kind", [*MULTISTEP, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_beta_sigmas_are_refused(kind):
    with pytest.raises(ValueError, match=r"samples a deviation of .* where 0.60 is right and DDIM has 0.57"):
        check_num_inference_steps(like(kind, use_beta_sigmas=True), 25)


def test_a_loss_of_accuracy_is_reported_once(warnings):
    scheduler = like(EulerDiscreteScheduler, use_karras_sigmas=True)
    for _ in range(2):
        check_num_inference_steps(scheduler, 25)
    assert len(warnings()) == 1
    assert "EulerDiscreteScheduler with num_inference_steps=25 samples a deviation of 0.47" in warnings()[0]
    check_num_inference_steps(like(EulerDiscreteScheduler), 25)
    assert len(warnings()) == 1


@pytest.mark.parametrize("kind", [*MULTISTEP, EulerDiscreteScheduler])
def test_timesteps_below_0_are_refused(kind):
    scheduler = like(kind)
    scheduler.set_timesteps(61)
    assert scheduler.timesteps.min() < 0
    with pytest.raises(ValueError, match=r"num_inference_steps=61 fails \(ValueError a timestep is below 0\)"):
        check_num_inference_steps(scheduler, 61)


@pytest.mark.parametrize("kind", [CosineLatentScheduler, DDIMScheduler, *MULTISTEP, HeunDiscreteScheduler])
@pytest.mark.parametrize("steps", [-1, 0, 501, 2.5, "25", None])
def test_numbers_of_steps_that_no_schedule_has_are_refused(kind, steps):
    with pytest.raises(ValueError, match=r"num_inference_steps=.* must be a whole number between 1 and 500"):
        check_num_inference_steps(like(kind), steps)


def test_a_scheduler_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler does not sample such a model"):
        check_num_inference_steps(FlowMatchEulerDiscreteScheduler(500), 25)


def test_the_state_of_a_scheduler_stays():
    scheduler = like(UniPCMultistepScheduler)
    scheduler.set_timesteps(7)
    before = scheduler.timesteps.clone()
    check_num_inference_steps(scheduler, 20)
    assert scheduler.timesteps.equal(before)
    assert scheduler.step_index is None


def table():
    """Return the rows of the tables in the docs: class, options, and deviation by number of steps."""
    head, *rows = re.findall(r"^\| (?:scheduler \||`\w+Scheduler`).*$", "\n".join(DOCS), re.MULTILINE)
    rows.remove(head)  # of the second table
    counts = [int(cell) for cell in head.split("|")[2:-1]]
    cells = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in rows]
    return [
        (*first.replace("`", "").partition(", ")[::2], dict(zip(counts, rest, strict=True))) for first, *rest in cells
    ]


@pytest.mark.parametrize(("name", "option", "deviations"), table(), ids=lambda value: str(value)[:40])
def test_the_table_of_the_docs_is_what_is_measured(name, option, deviations):
    kind = CosineLatentScheduler if name == "CosineLatentScheduler" else getattr(diffusers, name)
    setting, _, value = option.partition("=")
    scheduler = like(kind, **({setting: value == "True"} if option else {}))
    for steps, printed in deviations.items():
        try:
            check_num_inference_steps(scheduler, steps)
        except ValueError:
            assert printed == "refused"
        else:
            assert printed == f"{deviation(scheduler, steps):.2f}"


def test_the_table_has_every_scheduler_that_is_offered():
    from dit_hf.sampling.sample import SCHEDULERS

    assert {name for name, _, _ in table()} == {*SCHEDULERS, "CosineLatentScheduler"}
