"""Progress where the output is no terminal."""

import io

import datasets

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


def test_a_count_that_was_printed_with_figures_is_not_printed_again(capsys):
    with ProgressBar(2, "training", "steps") as bar:
        bar.update(2)
        bar.report("loss 0.1")
    assert capsys.readouterr().err == "training: 2 of 2 steps, loss 0.1\n"


def test_the_bar_says_what_else_is_done(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    with ProgressBar(10, "training", "steps") as bar:
        with bar.doing("validating"):
            assert "validating:   0%" in screen.getvalue().rpartition("\r")[2]
        assert "training:   0%" in screen.getvalue().rpartition("\r")[2]


def test_libraries_draw_no_bars_without_a_terminal(monkeypatch):
    for terminal in (True, False):
        monkeypatch.setattr(progress, "_terminal", lambda terminal=terminal: terminal)
        datasets.enable_progress_bars()
        progress.quiet_libraries()
        assert datasets.are_progress_bars_disabled() is not terminal
    datasets.enable_progress_bars()
