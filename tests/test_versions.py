"""Installed packages that are older than pyproject.toml says."""

from importlib import metadata

import pytest

import dit_hf_cli
from dit_hf.versions import check_versions

REQUIRED = ["diffusers>=0.41", "datasets>=4.0", "absent-package>=1", 'gradio>=6.0; extra == "app"']
INSTALLED = {"diffusers": "0.35.2", "datasets": "4.0.0", "gradio": "5.49.1"}


@pytest.fixture
def installed(monkeypatch):
    """Let these versions be installed, and return the dict of them."""

    def version(name):
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    found = dict(INSTALLED)
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRED)
    monkeypatch.setattr(metadata, "version", version)
    return found


def test_what_is_too_old_is_named_with_both_versions(installed):
    with pytest.raises(ImportError) as error:
        check_versions()
    assert str(error.value) == (
        "dit_hf needs diffusers>=0.41 (0.35.2 is installed); in an environment of its own: "
        "pip install 'diffusers>=0.41'"
    )
    with pytest.raises(ImportError, match=r"diffusers>=0.41 \(0.35.2 is installed\), gradio>=6.0 \(5.49.1 is"):
        check_versions("app")


def test_newer_ones_of_any_kind_pass(installed):
    installed.update(diffusers="0.43.0.dev0", datasets="6.0.0")
    check_versions()


def test_a_folder_that_was_never_installed_passes(monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    check_versions()


def test_a_command_prints_the_line_and_help_needs_no_package(installed, monkeypatch, capsys):
    def run(verb, args):
        check_versions()

    monkeypatch.setattr("dit_hf.cli.run", run)
    assert dit_hf_cli.main(["sample", "runs/mine"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("dit-hf sample: error: dit_hf needs diffusers>=0.41 (0.35.2 is installed)")
    assert len(err.splitlines()) == 1
    assert dit_hf_cli.main(["sample", "--help"]) == 0
