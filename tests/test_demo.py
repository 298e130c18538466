"""The demo, from the wheel in an empty environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dit_hf.demo import CAPTIONS, _caption_lines, _run_module

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_in_an_empty_environment_runs_the_demo_in_an_empty_folder(tmp_path):
    """Install the wheel, run the demo, load its pipeline; a second call reports that the demo is finished."""
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT], check=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    # Python compiles the modules that it imports; compiling all 20,000 of them takes minutes.
    pip = [python, "-m", "pip", "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt"]
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, next(tmp_path.glob("*.whl"))], check=True)
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
        environment.pop(name, None)

    def run(*command):
        return subprocess.run(command, check=True, cwd=work, env=environment, capture_output=True, text=True).stdout

    out = run(python.parent / "dit-hf", "demo", "--minutes", "0.05")
    assert "dit-hf prepare-latents" in out
    demo = work / "runs" / "demo"
    for name in ("sheet.png", "denoising.png", "loss_curve.png"):
        Image.open(demo / name).verify()
    assert {path.name for path in demo.iterdir()} >= {
        "latents",
        "pipeline",
        "config.yaml",
        "training_log.csv",
        "README.md",
    }
    code = (
        "import dit_hf; from diffusers import DiffusionPipeline;"
        "DiffusionPipeline.from_pretrained('runs/demo/pipeline')(num_inference_steps=25).images[0].save('face.png')"
    )
    run(python, "-c", code)
    assert Image.open(work / "face.png").size == (64, 64)
    assert "is finished" in run(python.parent / "dit-hf", "demo")


def test_a_module_of_the_current_folder_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("open('run', 'w')")
    monkeypatch.chdir(tmp_path)
    _run_module("json.tool", "--help")
    assert not (tmp_path / "run").exists()


def test_captions_have_no_empty_lines():
    """Attributes of the second line are missing; that of the third moves up."""
    row = {"Male": True} | {name: name in ("Smiling", "Black_Hair") for _, name, _ in CAPTIONS}
    assert _caption_lines(row) == ["man, smiling", "black hair"]
