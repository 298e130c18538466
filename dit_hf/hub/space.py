"""A Space that runs the app with a model: its files, and their upload."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from huggingface_hub import SpaceCardData

from ..storage import first_line, write_text
from ..upload import PUSHED_FILES, Content, Repository, upload_folder
from .card import project_address

APP, REQUIREMENTS, README = "app.py", "requirements.txt", "README.md"
SDK_VERSION = "6.31.0"  # of gradio, in the range of the extra `app`
HUB = "https://huggingface.co"  # where Spaces run, whatever Hub this process talks to
_IMPORT = "from dit_hf.app.app import app"
_CODE = f'''"""The page of {{model}}."""

import os

{_IMPORT}

# A Space sets the first of these.
host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), os.environ.get("GRADIO_SERVER_PORT", "7860")
app("{{model}}", host, int(port))
'''


def write_space(folder: Path, repo_id: str) -> None:
    """Fill `folder` with the Space that runs the app with the model `repo_id`, and has its name.

    From a clone it brings dit_hf itself, as a wheel; otherwise it installs the address in the package's metadata.

    Raises:
        ValueError: if there is neither a clone nor an address, or the wheel cannot be built.
    """
    checkout, address = Path(__file__).parents[2], project_address()
    if (checkout / "pyproject.toml").is_file():
        # By its address, because a Space installs its requirements before its files are there.
        wheel = _build_wheel(checkout, folder)
        source = f"{HUB}/spaces/{repo_id}/resolve/main/{wheel.name}"
    elif address is not None:
        source = f"git+{address}"
    else:
        raise ValueError("--space needs a clone of dit_hf, because the installed package names no public address")
    write_text(folder / REQUIREMENTS, f"dit_hf[app] @ {source}\n")
    write_text(folder / APP, _CODE.format(model=repo_id))
    write_text(folder / README, _readme(repo_id))


def upload_space(folder: Path, repo_id: str, overwrite: bool = False) -> str:
    """Upload a Space's files as the newest commit of the Space `repo_id`, and return its address.

    Raises:
        FileExistsError: if it holds something else, and `overwrite` is False.
    """

    return upload_folder(folder, repo_id, _CONTENT, overwrite=overwrite)


def is_space_file(name: str) -> bool:
    """Check whether `write_space` writes files of this name."""
    return name in (APP, REQUIREMENTS, README, PUSHED_FILES) or _is_wheel(name)


def _is_wheel(name: str) -> bool:
    return name.startswith("dit_hf-") and name.endswith(".whl")


def _readme(repo_id: str) -> str:
    """Return the README.md with the metadata of https://huggingface.co/docs/hub/spaces-config-reference."""
    name = repo_id.rpartition("/")[2]
    data = SpaceCardData(
        title=name,
        emoji="🎨",
        colorFrom="pink",
        colorTo="gray",
        sdk="gradio",
        sdk_version=SDK_VERSION,
        python_version="3.12",
        app_file=APP,
        models=[repo_id],
        license="apache-2.0",
    )
    text = f"The page of [{repo_id}]({HUB}/{repo_id}): it generates, edits, varies and inpaints images."
    return f"---\n{data.to_yaml()}\n---\n\n<!-- dit_hf: begin page -->\n{text}\n<!-- dit_hf: end page -->\n"


def _build_wheel(checkout: Path, folder: Path) -> Path:
    """Build the wheel of a clone into `folder`, without a network.

    Raises:
        ValueError: if that fails.
    """
    command = [
        sys.executable,
        "-P",
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(checkout),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = first_line(RuntimeError((done.stderr or done.stdout).strip().rpartition("\n")[2]))
        raise ValueError(f"the wheel of {checkout.name} was not built ({reason}); pip install build hatchling")
    return next(folder.glob("*.whl"))


def _check_repository(repository: Repository) -> None:
    """Refuse a Space that holds anything but the files of an earlier push.

    Raises:
        FileExistsError: if it does.
    """
    if APP in repository.files and _IMPORT in repository.download(APP).read_text("utf-8"):
        return
    name = repository.repo_id
    raise FileExistsError(f"the Space {name} holds something else already; give --overwrite true to replace it")


_CONTENT = Content(
    repo_type="space",
    commit_message="Upload a Space by dit_hf",
    check=_check_repository,
    is_ours=_is_wheel,
    metadata=("sdk", "sdk_version", "python_version", "app_file", "models"),  # without which it does not run
)
