"""The example scripts, as their docstrings start them."""

import runpy
import sys
from pathlib import Path

import nbformat
import pytest
from diffusers import DiffusionPipeline
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_training_loop_of_ones_own(latents, tmp_path, monkeypatch, capsys):
    options = ["--latents", str(latents), "--output_dir", str(tmp_path / "model"), "--max_train_steps", "30"]
    monkeypatch.setattr(sys, "argv", ["train_latent_dit.py", *options, "--train_batch_size", "4"])
    runpy.run_path(str(EXAMPLES / "train_latent_dit.py"), run_name="__main__")
    assert "step 30: loss" in capsys.readouterr().out
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "model")
    image = pipeline({"Smiling": True}, num_inference_steps=2).images[0]
    assert image.size == (16, 16)


def test_the_notebook_is_stored_with_its_images():
    """Its page on GitHub shows the three grids, and stays small enough to be rendered."""
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert not any(output.output_type == "error" for output in outputs)
    assert (EXAMPLES / "quickstart.ipynb").stat().st_size < 500_000


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """In a kernel of its own, with fewer images and steps."""
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("num_images=8000", "num_images=120").replace("= 1500,", "= 4,")
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert sum("image/png" in output["data"] for output in shown) == 3
    assert (tmp_path / "quickstart" / "run" / "pipeline").is_dir()
