"""The one upload to the Hub: a folder becomes one commit of a repository, whatever it holds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

from .card_blocks import card_metadata, renew_card, sign_blocks
from .hub_ids import hub_problem
from .storage import first_line, parse_json

CARD, GIT_ATTRIBUTES = "README.md", ".gitattributes"
# Names the files of the push that made a commit, and holds the card's metadata as we wrote it.
PUSHED_FILES = "pushed_files.json"
# Waits before an upload is retried, unless the Hub asks for more; files that it already has are not sent again.
RETRY_SECONDS = (2.0, 10.0, 30.0)
MAX_WAIT_SECONDS = 900.0
# Large files go up in parts of this size before the commit; what is up when a push is interrupted is not sent again.
PART_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub at one of its commits.

    Attributes:
        api: The client.
        repo_id: `OWNER/NAME`.
        repo_type: `model`, `dataset` or `space`.
        commit: The commit.
        files: Paths of all files.
        private: Whether only its owner may read it.
    """

    api: HfApi
    repo_id: str
    repo_type: str
    commit: str
    files: frozenset[str]
    private: bool

    @property
    def is_new(self) -> bool:
        """Whether there is nothing but what the site writes when it makes a repository: perhaps a card."""
        return self.files <= {GIT_ATTRIBUTES, CARD}

    def download(self, name: str) -> Path:
        """Download a file, and return its path."""
        path = self.api.hf_hub_download(self.repo_id, name, repo_type=self.repo_type, revision=self.commit)
        return Path(path)


@dataclass(frozen=True)
class Content:
    """What a folder to upload holds.

    Attributes:
        repo_type: `model`, `dataset` or `space` (of gradio).
        commit_message: The message of its commits.
        check: Refuses a repository that holds something else, by raising FileExistsError.
        is_ours: Whether a file of this name was surely pushed by an earlier version, which kept no list.
        metadata: Keys of the card's metadata that always are those of the folder.
        ignore_patterns: Patterns of files that are not uploaded.
    """

    repo_type: str
    commit_message: str
    check: Callable[[Repository], None]
    is_ours: Callable[[str], bool]
    metadata: Collection[str] = ()
    ignore_patterns: Collection[str] = ()


def upload_folder(
    folder: Path,
    repo_id: str,
    content: Content,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
) -> str:
    """Upload `folder` to a repository, which is created if it does not exist, and return its URL.

    The upload is one commit: it is there as a whole or not at all. Of the repository's other files it deletes those
    that an earlier upload listed in `pushed_files.json`. What the owner changed in the card stays, see [`renew_card`].

    Args:
        folder: The folder to upload.
        repo_id: The repository, `OWNER/NAME`.
        content: What the folder holds.
        private: Make a new repository private, and refuse one that everyone may read.
        revision: A branch, which is created if it does not exist, or an existing `refs/pr/1`; None is main.
        create_pr: Open a pull request with the commit.
        overwrite: Also replace what `content.check` refuses, and the card as a whole.

    Raises:
        FileExistsError: if the repository holds something else, or is public and should be private.
        ValueError: if the Hub refuses the upload.
        OSError: if the Hub cannot be reached, or the connection fails after several retries.
    """
    api = HfApi()
    if problem := hub_problem():
        raise OSError(f"{repo_id}: {api.endpoint} cannot be reached ({problem}); nothing was changed there")

    def attempt() -> str:
        repo_type = content.repo_type
        sdk = "gradio" if repo_type == "space" else None
        url = api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True, space_sdk=sdk)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        # Inside the retried part, so that every attempt compares with, and commits to, the newest commit.
        repository = _newest(api, repo_id, repo_type, revision)
        if private and not repository.private:
            raise FileExistsError(f"{repo_id} is public; make it private there, or allow it by --private false")
        if not (overwrite or repository.is_new):
            content.check(repository)
        pushed = _pushed_files(repository)
        added = _additions(folder, content, repository, pushed, overwrite)
        deleted = _deletions(content, repository, pushed, {file.path_in_repo for file in added})
        place: dict[str, Any] = {"repo_type": repo_type, "revision": revision, "create_pr": create_pr}
        for part in _parts(added):
            api.preupload_lfs_files(repo_id, part, **place, free_memory=False)
        commit = api.create_commit(
            repo_id,
            [*added, *deleted],
            commit_message=content.commit_message,
            parent_commit=repository.commit,
            **place,
        )
        return str(commit.pr_url or url)

    with _hub_errors(repo_id, revision):
        return _with_retries(attempt)


def _newest(api: HfApi, repo_id: str, repo_type: str, revision: str | None) -> Repository:
    """Return a repository at the newest commit of a revision."""
    info = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
    files = api.list_repo_files(repo_id, repo_type=repo_type, revision=info.sha)
    return Repository(api, repo_id, repo_type, str(info.sha), frozenset(files), bool(info.private))


def _additions(
    folder: Path, content: Content, repository: Repository, pushed: dict[str, Any], overwrite: bool
) -> list[CommitOperationAdd]:
    """Return the files to upload: those of the folder with the card renewed, and the list of them."""
    files: dict[str, Path | bytes] = {}
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    for name in filter_repo_objects(names, ignore_patterns=[*content.ignore_patterns, *DEFAULT_IGNORE_PATTERNS]):
        files[name] = folder.absolute() / name
    listed: dict[str, Any] = {"files": sorted({*files, PUSHED_FILES})}
    if CARD in files:
        card = sign_blocks((folder / CARD).read_text(encoding="utf-8"))
        listed["card"] = {"sha256": _text_sha256(card), "metadata": card_metadata(card)}
        if CARD in repository.files and not overwrite:
            card = _renewed_card(card, content, repository, pushed.get("card", {}))
        files[CARD] = card.encode()
    files[PUSHED_FILES] = (json.dumps(listed, indent=2) + "\n").encode()
    return [CommitOperationAdd(name, data) for name, data in files.items()]


def _renewed_card(card: str, content: Content, repository: Repository, pushed: dict[str, Any]) -> str:
    """Return a new card with what was changed in the present one since it was pushed, and print what that is."""
    theirs = repository.download(CARD).read_text(encoding="utf-8-sig", errors="replace")
    if pushed.get("sha256") == _text_sha256(theirs):
        return card
    renewed, kept = renew_card(card, theirs, pushed.get("metadata"), content.metadata, repository.is_new)
    if kept:
        print(f"{repository.repo_id}: of its card is kept what was changed there: {', '.join(kept)}", flush=True)
    return renewed


def _deletions(
    content: Content, repository: Repository, pushed: dict[str, Any], added: set[str]
) -> list[CommitOperationDelete]:
    """Return the files to delete: what an earlier push of ours listed, and this one does not have."""
    others = repository.files - added - {GIT_ATTRIBUTES}
    if pushed:
        ours = {name for name in others if name in pushed["files"]}
    else:  # pushed by an earlier version, or not by us
        ours = set(filter(content.is_ours, others))
        if kept := sorted(others - ours):
            more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
            names = f"{', '.join(kept[:3])}{more}"
            print(f"{repository.repo_id}: no earlier push has listed its files; kept: {names}", flush=True)
    return [CommitOperationDelete(name, is_folder=False) for name in sorted(ours)]


def _pushed_files(repository: Repository) -> dict[str, Any]:
    """Return the content of an earlier push's `pushed_files.json`; {} without a readable one.

    Returns:
        `files`, and with a card `card`: the SHA-256 and the metadata of the card as we wrote it.
    """
    if PUSHED_FILES not in repository.files:
        return {}
    try:
        pushed = parse_json(repository.download(PUSHED_FILES).read_bytes())
    except ValueError:
        return {}
    valid = isinstance(pushed, dict) and isinstance(pushed.get("files"), list)
    card = pushed.get("card", {}) if valid else None
    return pushed if isinstance(card, dict) and isinstance(card.get("metadata", {}), dict) else {}


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _parts(added: list[CommitOperationAdd]) -> Iterator[list[CommitOperationAdd]]:
    """Yield the files in parts of `PART_BYTES`, or of one larger file."""
    part: list[CommitOperationAdd] = []
    for file in added:
        if part and sum(other.upload_info.size for other in part) + file.upload_info.size > PART_BYTES:
            yield part
            part = []
        part.append(file)
    yield part


def _with_retries(attempt: Callable[[], str]) -> str:
    """Return the result of `attempt`, which is retried after temporary errors, when the Hub asks for it."""
    for wait in RETRY_SECONDS:
        try:
            return attempt()
        except Exception as error:
            requested = _requested_wait(error)
            if not _is_temporary(error) or requested > MAX_WAIT_SECONDS:
                raise
            time.sleep(max(wait, requested))
    return attempt()


def _is_temporary(error: Exception) -> bool:
    """Check whether a retry may succeed: after errors of the network or the Hub's servers, not after a refusal.

    Conflicts are temporary too: someone else has committed in between, and the retry compares with that commit.
    """
    # Every error of huggingface_hub that carries a response has `response.status_code`, whatever its class.
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in (408, 409, 412, 429)
    return not isinstance(error, ValueError | FileExistsError | FileNotFoundError | OfflineModeIsEnabled)


def _requested_wait(error: Exception) -> float:
    """Return the seconds after which the Hub asks to try again; 0 if it does not."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    found = re.fullmatch(r"(\d+)", headers.get("Retry-After", "").strip())
    # Without it a rate limit has its reset, https://huggingface.co/docs/hub/rate-limits.
    found = found or re.search(r"\br=0; *t=(\d+)", headers.get("RateLimit", ""))
    return float(found[1]) if found else 0.0


@contextlib.contextmanager
def _hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the Hub into one line that says what to do."""
    try:
        yield
    except FileExistsError:  # raised by `check`, with a message of its own
        raise
    except RevisionNotFoundError as error:
        advice = "dit-hf push --create_pr true opens a pull request"
        raise ValueError(f"{repo_id} has no revision {revision}; {advice}") from error
    except Exception as error:
        reason = first_line(error)
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        if isinstance(error, RepositoryNotFoundError):
            raise ValueError(f"{repo_id}: no such repository, or your token may not read it") from error
        if status == 401 or type(error).__name__ == "LocalTokenNotFoundError":
            raise ValueError(f"{repo_id}: no valid token; log in with `hf auth login`") from error
        if status == 403:
            raise ValueError(f"{repo_id}: your token has no write access ({reason})") from error
        if isinstance(error, ValueError) or 400 <= status < 500:
            raise ValueError(f"{repo_id}: {reason}; nothing was changed there") from error
        raise OSError(
            f"{repo_id}: {reason}; of this push there is all or nothing, and a second call sends only what is missing"
        ) from error
