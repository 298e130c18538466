"""Code and links in README and docs: Python runs, commands are accepted, links lead somewhere."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from conftest import tiny_transformer, tiny_vae
from peft import LoraConfig
from PIL import Image

from dit_hf import CosineLatentScheduler, LatentDiTPipeline, cli
from dit_hf.data.avatars import ATTRIBUTES

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *(ROOT / "docs").glob("*.md"),
]
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
# What the pages train, smaller. (The lines of docs/diffusers.md have a test of their own.)
SMALLER = {
    "num_images=2000": "num_images=72",
    'preset="tiny"': 'preset="tiny", num_layers=1, num_attention_heads=2, attention_head_dim=12',
    "max_train_steps=200": "max_train_steps=4",
    "num_samples=64": "num_samples=32",
    '"runs/mine/pipeline", vae=vae': '"runs/demo/pipeline", vae=vae',
}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text):
    """Return the commands of a page's shell blocks as lists of words, without what other shells and tools start."""
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [each for each in words if each]


def verb_of(command):
    """Return a command's verb of dit-hf and its options; None if it starts something else."""
    if command[0] == "dit-hf":
        return command[1], command[2:]
    scripts = [i for i, word in enumerate(command) if word.startswith("scripts/")]
    if scripts:
        return Path(command[scripts[0]]).stem.replace("_", "-"), command[scripts[0] + 1 :]
    return None


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what a page's code finds: a pipeline and a VAE of random weights, a LoRA, images."""
    monkeypatch.chdir(tmp_path)
    transformer = tiny_transformer(conditions=dict.fromkeys(ATTRIBUTES, 2))
    scheduler = CosineLatentScheduler(prediction_type="v_prediction")
    LatentDiTPipeline(transformer, scheduler, tiny_vae(), guidance_scale=2.0).save_pretrained("runs/demo/pipeline")
    tiny_vae().save_pretrained("vae")
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    transformer.save_lora_adapter("my-lora")
    Image.new("RGB", (20, 16), "teal").save("face.png")
    Image.new("L", (20, 16), 255).save("mask.png")


@pytest.mark.parametrize("page", [name for name in PAGES if blocks(PAGES[name], "python") and "diffusers" not in name])
def test_a_pages_code_runs_from_top_to_bottom(page, workplace):
    text = PAGES[page]
    for small, smaller in SMALLER.items():
        text = text.replace(small, smaller)
    context = {"other": Image.new("RGB", (16, 16), "navy")}  # docs/editing.md names a second image so
    for block in blocks(text, "python"):
        if "you/" in block:  # it loads from the Hub: tests/hub runs the same call
            ast.parse(block)
        else:
            exec(compile(block, page, "exec"), context)


@pytest.mark.parametrize("page", PAGES)
def test_a_pages_commands_are_accepted(page, monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda *_: 0)  # the options are read, and nothing is run
    monkeypatch.chdir(ROOT)
    for command in commands(PAGES[page]):
        if verb := verb_of(command):
            assert cli.run(*verb) == 0, command
        for word in command:
            if word.startswith(("scripts/", "recipes/", "benchmarks/", "tests/", "examples/")):
                assert (ROOT / word).exists(), command


@pytest.mark.parametrize("page", PAGES)
def test_a_pages_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", PAGES[page]):
        file, _, heading = "".join(target).partition("#")
        if file.startswith("http"):
            continue
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page}: {file}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, f"{page}: {file}#{heading}"
