"""The one upload to the Hub: a folder becomes the newest commit of a repository."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from .storage import first_line

# Waits before an upload is tried again; what the Hub has got by then is not sent again.
RETRY_SECONDS = (2.0, 10.0, 30.0)


def upload_folder(
    folder: Path,
    repo_id: str,
    repo_type: str,
    commit_message: str,
    private: bool = False,
    revision: str | None = None,
    delete_patterns: Sequence[str] = (),
    check: Callable[[HfApi], None] = lambda api: None,
) -> str:
    """Upload `folder` to a repository, which is created if it is not there; returns its address.

    All of it is one commit: an upload that is cut changes nothing, and one that is called again sends only those large
    files that the Hub has not got yet.

    Args:
        folder: What is uploaded.
        repo_id: The repository, `OWNER/NAME`.
        repo_type: `model` or `dataset`.
        commit_message: Of the commit.
        private: Whether a new repository is private.
        revision: The branch, which is created if it is not there; None is main.
        delete_patterns: Files of the repository to delete where `folder` has them no more.
        check: Called with the repository in place, before anything is sent; it raises to refuse.

    Raises:
        ValueError: if the Hub refuses.
        OSError: if it cannot be reached, or the connection breaks again and again.
    """
    api = HfApi()

    def attempt() -> str:
        url = api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        check(api)
        api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            delete_patterns=list(delete_patterns),
        )
        return str(url)

    with _hub_errors(repo_id):
        return _with_retries(attempt)


def _with_retries(attempt: Callable[[], str]) -> str:
    """What `attempt` returns, tried again where the connection was at fault."""
    for wait in RETRY_SECONDS:
        try:
            return attempt()
        except Exception as error:
            if not _is_passing(error):
                raise
            time.sleep(wait)
    return attempt()


def _is_passing(error: Exception) -> bool:
    """Whether it may go away by itself: the network's errors and the Hub's own, not what it refuses."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    return not isinstance(error, ValueError | FileExistsError | FileNotFoundError | OfflineModeIsEnabled)


@contextlib.contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """What goes wrong with the Hub, in one line that says what to do."""
    try:
        yield
    except FileExistsError:
        raise
    except Exception as error:
        reason = first_line(error)
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        if status == 401 or type(error).__name__ == "LocalTokenNotFoundError":
            raise ValueError(f"{repo_id}: the Hub does not know you; log in with `hf auth login`") from error
        if status == 403:
            raise ValueError(f"{repo_id}: your token may not write there ({reason})") from error
        if isinstance(error, ValueError):
            raise ValueError(f"{repo_id}: {reason}") from error
        raise OSError(
            f"{repo_id}: {reason}; nothing was changed there, and a second call sends only what is missing"
        ) from error
