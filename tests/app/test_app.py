"""The command that serves the app."""

import re
import sys

import pytest

from dit_hf.app.app import app
from dit_hf_cli import main


def test_a_model_that_cannot_be_served_is_one_line(capsys, tmp_path, monkeypatch):
    assert main(["app", str(tmp_path / "nowhere")]) == 1
    err = capsys.readouterr().err
    assert "nowhere: no such folder" in err
    assert len([line for line in err.splitlines() if "error" in line]) == 1
    monkeypatch.setitem(sys.modules, "gradio", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "dit_hf.app.page", raising=False)
    with pytest.raises(ValueError, match=re.escape("pip install gradio")):
        app(str(tmp_path))
