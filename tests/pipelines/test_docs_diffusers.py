"""Every line of code under "Works" in docs/diffusers.md runs as it stands there."""

import re
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import tiny_pipeline

DOCS = (Path(__file__).parents[2] / "docs" / "diffusers.md").read_text(encoding="utf-8")
SETUP = re.search(r"```python\n(.*?)```", DOCS, re.DOTALL)[1]


def rows(section):
    """Return name and lines of code of the rows of a section's tables."""
    text = DOCS.partition(f"## {section}")[2].partition("\n## ")[0]
    cells = [line.split("|") for line in text.splitlines()]
    return [(row[1].strip(), re.findall(r"`([^`]+)`", row[2])) for row in cells if len(row) == 5 and "`" in row[2]]


ROWS, GPU_ROWS = rows("Works"), rows("On a GPU")


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "faces"
    tiny_pipeline().save_pretrained(folder)
    return folder


def run_lines(lines, faces, tmp_path, monkeypatch):
    """Run the set-up of the docs and some lines in a folder with a saved pipeline, and generate an image."""
    monkeypatch.chdir(tmp_path)
    Path("faces").symlink_to(faces)
    context = {}
    exec(SETUP, context)
    for line in lines:
        exec(line, context)
    pipe = context["pipe"]
    options = {"output_type": "latent"} if pipe.vae is None else {"output_type": "np"}
    assert np.isfinite(np.asarray(pipe({"Smiling": True}, num_inference_steps=10, **options).images)).all()


def test_the_rows_are_found():
    assert len(ROWS) > 40
    assert GPU_ROWS


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # diffusers passes it
@pytest.mark.parametrize(("name", "lines"), ROWS, ids=[name for name, _ in ROWS])
def test_a_line_of_the_docs_runs_and_images_follow(name, lines, faces, tmp_path, monkeypatch, request):
    if any("push_to_hub" in line for line in lines):
        hub = request.getfixturevalue("hub")
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
    run_lines(lines, faces, tmp_path, monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("name", "lines"), GPU_ROWS, ids=[name for name, _ in GPU_ROWS])
def test_a_line_of_the_docs_runs_on_a_gpu(name, lines, faces, tmp_path, monkeypatch):
    run_lines(lines, faces, tmp_path, monkeypatch)
