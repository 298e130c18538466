"""`python -m dit_hf`, which launchers and machines without console scripts use."""

import runpy
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
