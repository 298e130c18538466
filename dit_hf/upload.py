"""The one upload to the Hub: a folder becomes the newest commit of a repository."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from .storage import first_line

# Waits before an upload is retried; files that the Hub already has are not sent again.
RETRY_SECONDS = (2.0, 10.0, 30.0)
ANSWER_SECONDS = 10.0


def is_hub_id(name: str | None) -> bool:
    """Check whether `name` has the form `OWNER/NAME`."""
    return name is not None and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def check_repo_id(repo_id: str, option: str) -> None:
    """Refuse what cannot be a repository of the Hub, before the work that would be pushed to it.

    Raises:
        ValueError: naming the option.
    """
    if not is_hub_id(repo_id):
        raise ValueError(f"{option} {repo_id}: expected OWNER/NAME, such as me/my-faces")


def upload_folder(
    folder: Path,
    repo_id: str,
    repo_type: str,
    commit_message: str,
    private: bool = False,
    revision: str | None = None,
    delete_patterns: Sequence[str] = (),
    ignore_patterns: Sequence[str] = (),
    check: Callable[[HfApi], None] = lambda api: None,
) -> str:
    """Upload `folder` to a repository, which is created if it does not exist, and return its URL.

    The upload is one commit: an interrupted one changes nothing, and calling again sends only the large files that the
    Hub does not have yet.

    Args:
        folder: The folder to upload.
        repo_id: The repository, `OWNER/NAME`.
        repo_type: `model`, `dataset` or `space` (of gradio).
        commit_message: Message of the commit.
        private: Make a new repository private.
        revision: The branch, which is created if it does not exist; None is main.
        delete_patterns: Patterns of files to delete from the repository if `folder` no longer has them.
        ignore_patterns: Patterns of files of `folder` that are not uploaded.
        check: Called once the repository exists and before anything is sent; it refuses the upload by raising.

    Raises:
        ValueError: if the Hub refuses the upload.
        OSError: if the Hub cannot be reached, or the connection fails after several retries.
    """
    api = HfApi()
    if problem := hub_problem():
        raise OSError(f"{repo_id}: {api.endpoint} cannot be reached ({problem}); nothing was changed there")

    def attempt() -> str:
        sdk = "gradio" if repo_type == "space" else None
        url = api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True, space_sdk=sdk)
        if revision is not None:
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        # Inside the retried part, so that every attempt compares with the newest commit.
        check(api)
        api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            delete_patterns=list(delete_patterns),
            ignore_patterns=list(ignore_patterns),
        )
        return str(url)

    with _hub_errors(repo_id):
        return _with_retries(attempt)


def hub_problem() -> str | None:
    """Return why the Hub cannot be reached, or None if it answers.

    It is asked once: huggingface_hub retries for 50 seconds, and waits without an end for a server that accepts
    connections and never answers.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS)
    except Exception as error:  # of the HTTP library, whose classes are not part of huggingface_hub's interface
        return first_line(error)
    return None


def _with_retries(attempt: Callable[[], str]) -> str:
    """Return the result of `attempt`, which is retried after temporary errors."""
    for wait in RETRY_SECONDS:
        try:
            return attempt()
        except Exception as error:
            if not _is_temporary(error):
                raise
            time.sleep(wait)
    return attempt()


def _is_temporary(error: Exception) -> bool:
    """Check whether a retry may succeed: after errors of the network or the Hub's servers, not after a refusal."""
    # Every error of huggingface_hub that carries a response has `response.status_code`, whatever its class.
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    return not isinstance(error, ValueError | FileExistsError | FileNotFoundError | OfflineModeIsEnabled)


@contextlib.contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turn errors of the Hub into one line that says what to do."""
    try:
        yield
    except FileExistsError:  # raised by `check`, with a message of its own
        raise
    except Exception as error:
        reason = first_line(error)
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        if status == 401 or type(error).__name__ == "LocalTokenNotFoundError":
            raise ValueError(f"{repo_id}: no valid token; log in with `hf auth login`") from error
        if status == 403:
            raise ValueError(f"{repo_id}: your token has no write access ({reason})") from error
        if isinstance(error, ValueError):
            raise ValueError(f"{repo_id}: {reason}") from error
        raise OSError(
            f"{repo_id}: {reason}; nothing was changed there, and a second call sends only what is missing"
        ) from error
