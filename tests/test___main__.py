"""`python -m dit_hf`, which launchers and machines without console scripts use."""

import io
import runpy
import sys

import pytest

import dit_hf
from dit_hf_cli import main


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
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    with pytest.raises(SystemExit) as ended:
        main(["train", "gesichter-ä"])
    assert b"'gesichter-?': a folder, not a recipe" in sys.stderr.buffer.getvalue()
    assert ended.value.code == 2
