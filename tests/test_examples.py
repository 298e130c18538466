"""The example scripts, as their docstrings start them."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import tiny_pipeline, tiny_transformer
from diffusers import DiffusionPipeline
from nbclient import NotebookClient

from dit_hf import LatentDiTPipeline
from dit_hf.latents.cache import open_latents

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, **options) -> None:
    """Run an example as `python examples/NAME --OPTION VALUE ...` does."""
    given = [part for option, value in options.items() for part in (f"--{option}", str(value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *given])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_a_training_loop_of_ones_own(latents, tmp_path, capsys):
    run("train_latent_dit.py", latents=latents, output_dir=tmp_path, max_train_steps=30, train_batch_size=4)
    assert "step 30: loss" in capsys.readouterr().out
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    image = pipeline({"Smiling": True}, num_inference_steps=2).images[0]
    assert image.size == (16, 16)


def test_a_lora_brings_a_model_closer_to_the_images(latents, tmp_path):
    """The model is random, and knows a condition, the class, that the cache lacks."""
    pipeline, adapter = tiny_pipeline(), tmp_path / "lora"
    pipeline.save_pretrained(tmp_path / "model")
    options = {"model": tmp_path / "model", "latents": latents, "output_dir": adapter, "learning_rate": 1e-2}
    run("lora.py", **options, max_train_steps=60, train_batch_size=8)
    assert [path.name for path in adapter.iterdir()] == ["pytorch_lora_weights.safetensors"]
    before = prediction_error(pipeline, latents)
    pipeline.transformer.load_lora_adapter(str(adapter), prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert prediction_error(pipeline, latents) < 0.9 * before
    pipeline.transformer.disable_adapters()
    assert prediction_error(pipeline, latents) == before


def test_a_lora_for_latents_of_another_size_is_refused(latents, tmp_path):
    pipeline = tiny_pipeline()
    LatentDiTPipeline(tiny_transformer(sample_size=4), pipeline.scheduler, pipeline.vae).save_pretrained(
        tmp_path / "model"
    )
    with pytest.raises(SystemExit, match="use its VAE and resolution"):
        run("lora.py", model=tmp_path / "model", latents=latents, output_dir=tmp_path / "lora")


@torch.no_grad()
def prediction_error(pipeline, latents) -> float:
    """Return the error of the velocity that a pipeline's model predicts for the images of a cache, at fixed noise."""
    rows, info = open_latents(latents)
    count, shape = len(rows), info["latent_shape"]
    mean, std = (torch.tensor(pipeline.config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    clean = torch.tensor(rows["latent_mean"][:]).view(count, *shape).sub(mean).div(std)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.arange(count) * len(pipeline.scheduler) // count
    noisy = pipeline.scheduler.add_noise(clean, noise, timesteps)
    prediction = pipeline.transformer(noisy, timesteps).sample
    return torch.nn.functional.mse_loss(prediction, pipeline.scheduler.get_velocity(clean, noise, timesteps)).item()


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


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shell_scripts_pass_shellcheck():
    root = EXAMPLES.parent
    scripts = [EXAMPLES / "train.sbatch", *root.glob("benchmarks/*.sh"), *root.glob("tests/training/slurm/*")]
    done = subprocess.run(["shellcheck", *scripts, root / ".ci" / "run"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
