"""The files of a report: one figure, its floors and its protocol, and no plot of an earlier call."""

import numpy as np
import pytest

from dit_hf.evaluation.memorization import find_neighbours
from dit_hf.evaluation.report import figure_name, write_report
from dit_hf.storage import read_json

FIGURES = {
    "frechet_distance": 12.345,
    "standard_error": 0.5,
    "extrapolated": 11.0,
    "kid": 0.0123,
    "precision": 0.7,
    "recall": 0.4,
    "num_samples": 2000,
    "num_reference": 10000,
}


@pytest.fixture
def neighbours():
    rng = np.random.default_rng(0)
    return find_neighbours(rng.normal(size=(40, 3)), rng.normal(size=(80, 3)))


def report(neighbours, scales):
    settings = [{"guidance_scale": scale, "num_inference_steps": 25, "accuracy": None, **FIGURES} for scale in scales]
    return {
        "name": "FID-2k",
        "model": {"name": "faces"},
        "protocol": {"seed": 7, "features": {"name": "inception", "dim": 2048}, "reference": {"pictures": 10000}},
        "figures": FIGURES,
        "floor": {"vae": {"reason": "statistics hold no images"}, "real": {**FIGURES, "frechet_distance": 1.5}},
        "bias": "Compare with others of the same N only.",
        "memorisation": neighbours.figures(),
        "attributes": None,
        "settings": settings,
    }


@pytest.mark.parametrize(
    ("count", "name"), [(50_000, "FID-50k"), (1000, "FID-1k"), (512, "FID-512"), (2500, "FID-2500")]
)
def test_a_distance_is_named_with_its_number_of_samples(count, name):
    assert figure_name("FID", count) == name


def test_the_table_has_the_figure_its_error_its_floors_and_the_protocol(neighbours, tmp_path):
    write_report(tmp_path, report(neighbours, [2.0]), neighbours)
    lines = (tmp_path / "evaluation.md").read_text().splitlines()
    assert "# faces: FID-2k 12.35 ± 0.98" in lines
    assert "| FID-2k | 12.35 ± 0.98 | not measured (statistics hold no images) | 1.5 ± 0.98 |" in lines
    assert "| KID | 0.0123 | not measured | 0.0123 |" in lines
    assert "| images | 2,000 | not measured | 2,000 |" in lines
    protocol = {"seed": 7, "features": "inception", "features: dim": 2048, "reference: pictures": 10000}
    assert {f"| {name} | {value} |" for name, value in protocol.items()} <= set(lines)
    assert read_json(tmp_path / "evaluation.json") == report(neighbours, [2.0])


def test_a_plot_of_settings_is_that_of_this_report(neighbours, tmp_path):
    for scales in ([1.0, 2.0], [2.0]):
        write_report(tmp_path, report(neighbours, scales), neighbours)
        assert (tmp_path / "settings.png").exists() == (len(scales) > 1)
        table = (tmp_path / "evaluation.md").read_text()
        assert ("| 1 | 25 | 12.35 ± 0.98 | not measured |" in table) == (len(scales) > 1)
