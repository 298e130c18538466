"""Calls that would mix their steps are refused; the one that came first is right."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import tiny_pipeline
from diffusers import FirstBlockCacheConfig
from PIL import Image
from pipeline_calls import run

from dit_hf import (
    CosineLatentScheduler,
    LatentDiTEditPipeline,
    LatentDiTImg2ImgPipeline,
    LatentDiTInpaintPipeline,
    LatentDiTPipeline,
)

IN_USE = "is in use by another call.*a scheduler of its own"


def during(pipeline, other):
    """Return the images of a call, and what `other()` returns or raises in a second thread at its first step."""
    results = []

    def call(_pipeline, step, _timestep, tensors):
        if step == 0:
            with ThreadPoolExecutor(1) as pool:
                results.append(pool.submit(other))
        return tensors

    return run(pipeline, callback_on_step_end=call), results[0]


def test_a_second_thread_is_refused_and_the_first_is_right():
    pipeline = tiny_pipeline()
    alone = run(pipeline)
    others = [
        lambda: run(pipeline, seed=1),
        lambda: run(LatentDiTPipeline(**pipeline.components), seed=1),
        lambda: LatentDiTImg2ImgPipeline(**pipeline.components)(image=Image.new("RGB", (16, 16))),
        lambda: LatentDiTEditPipeline(**pipeline.components).invert(Image.new("RGB", (16, 16))),
    ]
    for other in others:
        first, second = during(pipeline, other)
        assert np.array_equal(first, alone)
        with pytest.raises(RuntimeError, match=IN_USE):
            second.result()
    assert np.array_equal(run(pipeline), alone)


def test_a_call_in_a_callback_is_refused():
    pipeline = tiny_pipeline()
    with pytest.raises(RuntimeError, match=IN_USE):
        run(pipeline, callback_on_step_end=lambda *_: run(pipeline))
    run(pipeline)  # the error has released it


def test_threads_with_schedulers_of_their_own_share_the_model():
    pipe = tiny_pipeline()
    alone = [run(pipe, seed=seed, num_inference_steps=steps) for seed, steps in ((0, 4), (1, 6))]
    # As the error says.
    scheduler = CosineLatentScheduler.from_config(pipe.scheduler.config)
    other = LatentDiTPipeline(**{**pipe.components, "scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    barrier = threading.Barrier(2)

    def step_by_turns(_pipeline, step, _timestep, tensors):
        if step < 4:
            barrier.wait(10)
        return tensors

    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(run, each, seed=seed, num_inference_steps=steps, callback_on_step_end=step_by_turns)
            for each, seed, steps in ((pipe, 0, 4), (other, 1, 6))
        ]
    for call, expected in zip(calls, alone, strict=True):
        np.testing.assert_allclose(call.result(), expected, atol=1e-5)


def test_a_cache_belongs_to_one_call_too():
    pipeline = tiny_pipeline()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    scheduler = CosineLatentScheduler.from_config(pipeline.scheduler.config)
    other = LatentDiTPipeline(**{**pipeline.components, "scheduler": scheduler})
    _, second = during(pipeline, lambda: run(other))
    with pytest.raises(RuntimeError, match="LatentDiTTransformer2DModel is in use"):
        second.result()


@pytest.mark.parametrize(
    "kind", [LatentDiTPipeline, LatentDiTImg2ImgPipeline, LatentDiTInpaintPipeline, LatentDiTEditPipeline]
)
@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_a_prompt_is_refused_with_what_to_give_instead(kind, name):
    pipeline = kind(**tiny_pipeline().components)
    with pytest.raises(
        TypeError, match=f"^{kind.__name__} reads no text and has no {name}; request attributes instead"
    ):
        pipeline(**{name: "a face"})
