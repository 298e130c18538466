"""The wheel and the source distribution, as a package index and a type checker see them."""

import email
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def read_readme_hook():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_metadata_is_what_an_index_shows(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        metadata = email.message_from_bytes(wheel.read(next(name for name in names if name.endswith("METADATA"))))
    assert "dit_hf/py.typed" in names
    assert metadata["Author"] == "The dit_hf authors"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# dit_hf\n")


def test_the_source_distribution_builds_the_same_and_has_no_files_of_ci(built, tmp_path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
        archive.extractall(tmp_path, filter="data")
    assert {"pyproject.toml", "hatch_build.py", "README.md", "tests", "docs"} <= tops
    assert not tops & {".ci", ".github", ".venv", ".versions", "runs", "dist"}
    source = next(tmp_path.iterdir())
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "again"]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    wheels = [next(folder.glob("*.whl")) for folder in (built, tmp_path / "again")]
    contents = [{name: file.read(name) for name in file.namelist()} for file in map(zipfile.ZipFile, wheels)]
    assert contents[0] == contents[1]


def test_links_lead_to_the_repository_once_it_has_an_address():
    readme = (ROOT / "README.md").read_text()
    text = read_readme_hook().absolute_links(readme, "https://git.example/you/dit_hf")
    assert "https://git.example/you/dit_hf/raw/main/docs/images/faces.png" in text
    assert "](https://git.example/you/dit_hf/blob/main/docs/data.md)" in text
    targets = re.findall(r'(?:\]\(|src=")([^)"]+)', text)
    assert targets
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    # Nothing else has changed.
    assert re.sub(r"https://git\.example/you/dit_hf/(raw|blob)/main/", "", text) == readme


@pytest.mark.slow
def test_a_type_checker_reads_the_types_from_outside(built, tmp_path):
    """In an environment that has the wheel and nothing else: PEP 561 asks for `py.typed`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(next((tmp_path / "venv").glob("lib/*/site-packages")))
    (tmp_path / "program.py").write_text('import dit_hf\n\nrows = dit_hf.open_images("pictures", resolution=64)\n')
    (tmp_path / "wrong.py").write_text("import dit_hf\n\ndit_hf.open_images(3)\n")
    environment = {**os.environ, "PYTHONPATH": "", "MYPYPATH": ""}

    def check(program):
        python = tmp_path / "venv" / "bin" / "python"
        command = [sys.executable, "-m", "mypy", "--python-executable", python, program]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert check("program.py").returncode == 0, check("program.py").stdout
    assert 'Argument 1 to "open_images" has incompatible type "int"' in check("wrong.py").stdout
