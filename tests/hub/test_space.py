"""The Space that `dit-hf push --space` writes."""

import os
import re
import subprocess
import sys
import urllib.request

import pytest
from conftest import tiny_pipeline
from huggingface_hub import RepoCard
from packaging.requirements import Requirement
from repositories import assert_no_leaks, push

from dit_hf.hub import space
from dit_hf.hub.space import SDK_VERSION, upload_space, write_space

WHEEL = "dit_hf-0.1.0-py3-none-any.whl"


@pytest.fixture
def folder(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def wheel(monkeypatch):
    """An empty wheel, because building one takes seconds."""

    def build(_checkout, folder):
        (folder / WHEEL).write_bytes(b"")
        return folder / WHEEL

    monkeypatch.setattr(space, "_build_wheel", build)


def test_a_model_and_its_space_are_pushed(hub, folder, wheel, tmp_path, capsys):
    code, line = push(capsys, folder, "you/faces", "--space", "--output_dir", tmp_path / "out")
    assert (code, line) == (0, f"its Space is {hub.endpoint}/spaces/you/faces")
    assert {*hub.repositories["spaces/you/faces"]} == {
        ".gitattributes",
        "README.md",
        "pushed_files.json",
        "app.py",
        "requirements.txt",
        WHEEL,
    }
    assert "model_index.json" in hub.repositories["you/faces"]
    assert_no_leaks(tmp_path / "out-space")
    card = RepoCard.load(tmp_path / "out-space" / "README.md", ignore_metadata_errors=False)
    assert (card.data.sdk, card.data.app_file, card.data.models) == ("gradio", "app.py", ["you/faces"])
    requirement = Requirement((tmp_path / "out-space" / "requirements.txt").read_text().strip())
    assert requirement.url == f"https://huggingface.co/spaces/you/faces/resolve/main/{WHEEL}"
    assert requirement.extras == {"app"}
    # Pushed again it replaces its own files, and those of nobody else.
    again = [folder, "you/faces", "--space", "--output_dir", tmp_path / "out", "--overwrite"]
    assert push(capsys, *again)[0] == 0
    hub.repositories["spaces/you/faces"]["app.py"] = b"print('mine')"
    code, line = push(capsys, folder, "you/faces", "--space")
    assert code == 1
    assert "the Space you/faces holds something else already" in line
    assert hub.repositories["spaces/you/faces"]["app.py"] == b"print('mine')"
    (tmp_path / "out-space" / "notes.txt").write_text("mine")
    code, line = push(capsys, *again)
    assert code == 1
    assert "out-space holds notes.txt, which no push has written" in line


@pytest.mark.parametrize("options", [["--private"], ["--revision", "new"], ["--builtin"]])
def test_a_space_loads_a_public_model(hub, folder, options, capsys):
    code, line = push(capsys, folder, "you/faces", "--space", *options)
    assert code == 1
    assert "--space loads a public OWNER/NAME: it takes no --builtin, --private, --revision or" in line
    assert hub.repositories == {}


def test_without_a_clone_a_space_installs_the_public_address(tmp_path, monkeypatch):
    monkeypatch.setattr(space, "__file__", str(tmp_path / "site-packages" / "dit_hf" / "hub" / "space.py"))
    monkeypatch.setattr(space, "project_address", lambda: "https://example.org/dit_hf")
    write_space(tmp_path, "you/faces")
    assert (tmp_path / "requirements.txt").read_text() == "dit_hf[app] @ git+https://example.org/dit_hf\n"
    monkeypatch.setattr(space, "project_address", lambda: None)
    with pytest.raises(ValueError, match="--space needs a clone of dit_hf"):
        write_space(tmp_path, "you/faces")


def test_the_space_runs_a_gradio_of_the_package():
    with open(os.path.join(os.path.dirname(__file__), "../../pyproject.toml")) as file:
        (requirement,) = re.findall(r'"(gradio[^"]*)"', file.read())
    assert Requirement(requirement).specifier.contains(SDK_VERSION)


@pytest.mark.slow
def test_the_spaces_folder_runs_the_page_and_brings_a_wheel(hub, folder, tmp_path, capsys):
    assert push(capsys, folder, "you/faces", "--space", "--output_dir", tmp_path / "out")[0] == 0
    assert (tmp_path / "out-space" / WHEEL).stat().st_size > 100_000
    environment = {**os.environ, **hub.environment(), "GRADIO_SERVER_PORT": "7999", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-u", "app.py"]
    with subprocess.Popen(
        command,
        cwd=tmp_path / "out-space",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        try:
            lines = []
            for line in server.stdout:
                lines.append(line)
                if found := re.search(r"you/faces at (http://\S+)", line):
                    break
            else:
                pytest.fail("".join(lines))
            page = urllib.request.urlopen(found[1]).read().decode()
            assert "dit_hf: you/faces" in page
            assert "A latent Diffusion Transformer" in page
        finally:
            server.kill()


def test_what_was_changed_in_a_space_on_the_site_is_kept(hub, wheel, tmp_path):
    """Its title and its words; the settings with which it runs are ours until they are changed."""
    hub.repositories["spaces/you/faces"] = {
        "README.md": b"---\ntitle: My faces\nsdk: static\n---\n\nMade by me.\n",
        ".gitattributes": b"",
    }
    write_space(tmp_path, "you/faces")
    for _ in range(2):
        upload_space(tmp_path, "you/faces")
        card = RepoCard(hub.repositories["spaces/you/faces"]["README.md"].decode())
        assert (card.data.title, card.data.sdk, card.data.app_file) == ("My faces", "gradio", "app.py")
        assert "Made by me." in card.text
        assert card.text.count("The page of") == 1
