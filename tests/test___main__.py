"""`python -m dit_hf`, which launchers and machines without console scripts use."""

import os
import runpy
import subprocess
import sys

import pytest

import dit_hf


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--version"], 0),
        (["reference", "nowhere", "--output_dir", "statistics"], 1),
        (["trian"], 2),
    ],
)
def test_the_module_is_the_command_and_ends_with_its_code(monkeypatch, tmp_path, capsys, args, code):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dit_hf", *args])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("dit_hf", run_name="__main__")
    assert (ended.value.code or 0) == code
    if code == 0:
        assert capsys.readouterr().out == f"dit_hf {dit_hf.__version__}\n"


def test_a_terminal_without_a_letter_gets_another_in_its_place(monkeypatch, tmp_path):
    (tmp_path / "gesichter-ä").mkdir()
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    command = [sys.executable, "-m", "dit_hf", "train", "gesichter-ä"]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True)
    assert b"gesichter-?" in run.stderr
    assert b"Traceback" not in run.stderr
    assert run.returncode == 2
