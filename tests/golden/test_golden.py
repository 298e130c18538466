"""Tiny runs end as they always have, and what earlier versions wrote is still read.

The bits are those of the record where this kind of CPU is known to `cpu_losses.json` (see record.py), and close to it
on any other.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import record
import torch

RECORDED = json.loads(record.CPU_LOSSES.read_text(encoding="utf-8"))
HERE = RECORDED.get(record.cpu_kind())
GOLDEN = json.loads((record.GOLDEN / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with record.one_thread():
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record.build_cache(tmp_path_factory.mktemp("golden") / "latents")


@pytest.fixture(params=record.kept_folders(), ids=lambda folder: folder.name)
def kept(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what an earlier version wrote, and the working directory, which its paths are relative to."""
    copy = tmp_path / request.param.name
    shutil.copytree(request.param, copy)
    monkeypatch.chdir(copy)
    return copy


@pytest.mark.parametrize("recipe", record.RECIPES)
def test_losses_are_those_of_the_record(recipe: str, cache: Path, tmp_path: Path) -> None:
    losses = list(record.read_losses(record.train_recipe(recipe, cache, tmp_path / "run")).values())
    if HERE is not None:
        assert losses == HERE["losses"][recipe]
    values = [float.fromhex(loss) for loss in losses]
    for kind, known in RECORDED.items():
        expected = [float.fromhex(loss) for loss in known["losses"][recipe]]
        assert values[:10] == pytest.approx(expected[:10], rel=1e-4), kind
        assert values == pytest.approx(expected, rel=1e-2), kind


def test_kept_cache_opens(kept: Path) -> None:
    assert record.hash_cache(kept / "latents") == GOLDEN[kept.name]["cache"]


def test_kept_pipeline_generates(kept: Path) -> None:
    pipeline = record.LatentDiTPipeline.from_pretrained(kept / "pipeline")
    pixels = record.generate(pipeline, attributes=[record.HAS, {}])
    assert pixels.shape == (2, 3, 16, 16)
    assert torch.isfinite(pixels).all()
    if HERE is not None and kept.name in HERE["pixels"]:
        assert record.hash_array(pixels.numpy()) == HERE["pixels"][kept.name]


def test_kept_run_is_resumed_to_its_end_and_exports_what_an_uninterrupted_one_did(kept: Path) -> None:
    before = record.read_losses(kept / "run")
    record.run_verb("train", "--config", "run/config.yaml", "--train.resume_from_checkpoint", "latest")
    losses = record.read_losses(kept / "run")
    assert [*losses] == [str(step) for step in range(1, 13)]
    assert {step: losses[step] for step in before} == before
    exported, expected = (
        record.LatentDiTPipeline.from_pretrained(folder).transformer.state_dict()
        for folder in (kept / "run" / "pipeline", kept / "pipeline")
    )
    torch.testing.assert_close(exported, expected, rtol=1e-2, atol=1e-4)  # Muon rounds otherwise than it did


def test_kept_checkpoint_is_sampled(kept: Path) -> None:
    options = ("--num_images", "2", "--num_inference_steps", "2", "--output_format", "npz")
    record.run_verb("sample", kept / "run" / "checkpoint-6", "--output_dir", kept / "samples", *options)
    assert np.load(kept / "samples" / "samples.npz")["arr_0"].shape == (2, 16, 16, 3)
