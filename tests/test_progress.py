"""Progress where the output is no terminal."""

import io

from dit_hf import progress
from dit_hf.progress import ProgressBar


def test_without_a_terminal_there_are_lines(monkeypatch, capsys):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    with ProgressBar(1_000, "encoding", "images", initial=200) as bar:
        bar.update(400)
        bar.report("loss 0.1")
        bar.write("a note")
        bar.update(400)
    lines = capsys.readouterr().err.split("\n")
    assert lines[0].startswith("encoding: 600 of 1,000 images, 0:00:0")
    assert lines[1].startswith("encoding: 600 of 1,000 images, loss 0.1, 0:00:0")
    assert lines[2] == "a note"
    assert lines[-2:] == ["encoding: 1,000 of 1,000 images", ""]
    assert not any("\r" in line for line in lines)


def test_lines_are_a_minute_apart(capsys):
    with ProgressBar(1_000, "encoding", "images") as bar:
        for _ in range(999):
            bar.update()
    assert capsys.readouterr().err == ""


def test_in_a_terminal_there_is_a_bar(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    with ProgressBar(10, "encoding", "images") as bar:
        bar.update(10)
        bar.report("loss 0.1")
    assert "\rencoding: 100%" in screen.getvalue()
    assert "loss 0.1" in screen.getvalue()


def test_other_ranks_print_nothing(capsys):
    with ProgressBar(2, "encoding", "images", shown=False) as bar:
        bar.update(2)
        bar.report("loss 0.1")
        bar.write("a note")
    assert capsys.readouterr() == ("", "")
