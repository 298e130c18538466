"""The example scripts, as their docstrings start them."""

import runpy
import sys
from pathlib import Path

from diffusers import DiffusionPipeline

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_training_loop_of_ones_own(latents, tmp_path, monkeypatch, capsys):
    options = ["--latents", str(latents), "--output_dir", str(tmp_path / "model"), "--max_train_steps", "30"]
    monkeypatch.setattr(sys, "argv", ["train_latent_dit.py", *options, "--train_batch_size", "4"])
    runpy.run_path(str(EXAMPLES / "train_latent_dit.py"), run_name="__main__")
    assert "step 30: loss" in capsys.readouterr().out
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "model")
    image = pipeline({"Smiling": True}, num_inference_steps=2).images[0]
    assert image.size == (16, 16)
