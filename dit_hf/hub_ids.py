"""Names of repositories on the Hub, the revisions that may follow them, and why a repository cannot be read."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import HFValidationError, get_session, validate_repo_id

from .storage import first_line

ANSWER_SECONDS = 10.0


def is_hub_id(name: str | None) -> bool:
    """Check whether `name` has the form `OWNER/NAME`."""
    return name is not None and _id_problem(name) is None


def check_repo_id(repo_id: str, option: str) -> None:
    """Refuse what cannot be a repository of the Hub, before the work that would be pushed to it.

    Raises:
        ValueError: naming the option.
    """
    if problem := _id_problem(repo_id):
        raise ValueError(f"{option} {repo_id}: {problem}")


def is_pull_request(revision: str | None) -> bool:
    """Check whether a revision is that of a pull request, such as `refs/pr/1`."""
    return revision is not None and re.fullmatch(r"refs/pr/\d+", revision) is not None


def check_branch(revision: str | None) -> None:
    """Refuse what nothing can be pushed to, before the work that would be.

    Raises:
        ValueError: if it is a commit, or a reference other than a pull request's.
    """
    if revision is None or is_pull_request(revision):
        return
    if revision.startswith("refs/") or re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(
            f"nothing can be pushed to {revision}: expected a branch, or a pull request such as refs/pr/1"
        )


def split_revision(name: str) -> tuple[str, str | None]:
    """Split `OWNER/NAME@REVISION` (a branch, tag, commit or `refs/pr/1`); the revision is None if there is none."""
    repo_id, _, revision = name.partition("@")
    is_path = name.startswith(("/", ".", "~")) or Path(name).exists()
    return (name, None) if is_path or not revision or "/" not in repo_id else (repo_id, revision)


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


def reading_problem(repo_id: str, revision: str | None = None, file: str = "config.json") -> str | None:
    """Return why a model on the Hub cannot be read, or None if it can; the Hub is asked once.

    What is asked for may still be on this machine.

    Args:
        repo_id: The repository, `OWNER/NAME`.
        revision: A branch, tag, commit or `refs/pr/1`; None is main.
        file: A file of it, existing or not.
    """
    try:
        get_hf_file_metadata(hf_hub_url(repo_id, file, revision=revision), timeout=ANSWER_SECONDS)
    except EntryNotFoundError:
        return None
    except GatedRepoError:
        address = f"{constants.ENDPOINT}/{repo_id}"
        return f"gated on the Hub: ask for access at {address}, and log in by `hf auth login`"
    except RepositoryNotFoundError:
        return "no such model on the Hub, or a private one: check the name, or log in by `hf auth login`"
    except RevisionNotFoundError:
        return f"{repo_id} has no branch, tag or commit {revision} on the Hub"
    except HFValidationError:
        return "no such folder, and on the Hub a model is OWNER/NAME or OWNER/NAME@REVISION"
    except Exception as error:  # of the HTTP library, as above
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            return "the Hub does not know your token: log in by `hf auth login`"
        if status is not None:
            return f"the Hub refuses it ({first_line(error)})"
        return f"not on this machine, and the Hub cannot be reached ({first_line(error)})"
    return None


def _id_problem(name: str) -> str | None:
    """Return why `name` is not of the form `OWNER/NAME`, or None if it is."""
    expected = "expected OWNER/NAME, such as me/my-faces"
    if name.count("/") != 1:
        return expected
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return f"{expected} ({first_line(error)})"
    return None
