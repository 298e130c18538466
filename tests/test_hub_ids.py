"""Names of repositories, revisions, and what is said of a repository that cannot be read."""

import pytest

from dit_hf.hub_ids import check_branch, check_repo_id, is_hub_id, reading_problem, split_revision


def test_ids_of_repositories():
    assert all(is_hub_id(name) for name in ("a/b", "you/x-1.0"))
    assert not any(is_hub_id(name) for name in ("a/b/c", "/a", "./a", "a", "you/my faces", None))
    check_repo_id("you/faces", "push_to_hub")
    with pytest.raises(ValueError, match=r"push_to_hub faces: expected OWNER/NAME, such as me/my-faces"):
        check_repo_id("faces", "push_to_hub")


def test_revisions_follow_the_id(tmp_path, monkeypatch):
    assert split_revision("you/x") == ("you/x", None)
    assert split_revision("you/x@v2") == ("you/x", "v2")
    assert split_revision("you/x/vae@refs/pr/1") == ("you/x/vae", "refs/pr/1")
    assert split_revision("you/x@") == ("you/x@", None)
    # A path is no id, whatever is in its name.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs@home" / "a").mkdir(parents=True)
    for path in ("runs@home/a", "./a/b@v2", "~/a@v2", "/a/b@v2", "a@b"):
        assert split_revision(path) == (path, None)


def test_nothing_is_pushed_to_a_commit():
    for revision in (None, "main", "v1.0", "refs/pr/12", "added"):
        check_branch(revision)
    for revision in ("0" * 40, "refs/pr/x", "refs/heads/main"):
        with pytest.raises(ValueError, match=f"nothing can be pushed to {revision}: expected a branch, or"):
            check_branch(revision)


ACCESS = "gated on the Hub: ask for access at {endpoint}/you/real, and log in by `hf auth login`"
MISSING = "no such model on the Hub, or a private one: check the name, or log in by `hf auth login`"


@pytest.mark.parametrize(
    ("status", "code", "problem"),
    [
        (403, "GatedRepo", ACCESS),
        (401, "GatedRepo", ACCESS),
        (401, "RepoNotFound", MISSING),
        (404, "RepoNotFound", MISSING),
        (404, "RevisionNotFound", "you/real has no branch, tag or commit v2 on the Hub"),
        (401, "", "the Hub does not know your token: log in by `hf auth login`"),
        (404, "EntryNotFound", None),
    ],
)
def test_why_a_model_cannot_be_read(hub, status, code, problem):
    hub.denied["you/real"] = (status, code)
    expected = problem and problem.format(endpoint=hub.endpoint)
    assert reading_problem("you/real", "v2") == expected
    assert sum("you/real" in request for request in hub.requests) == 1


def test_a_hub_that_is_ill_or_away(hub, monkeypatch):
    hub.denied["you/real"] = (503, "")
    assert reading_problem("you/real").startswith("the Hub refuses it (")
    assert "OWNER/NAME@REVISION" in reading_problem("you/real@")
    hub.broken = {"*"}
    assert reading_problem("you/real").startswith("not on this machine, and the Hub cannot be reached (")
