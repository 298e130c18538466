"""Uploads to a small Hub of our own: whole or not at all, and refused in one line."""

import socket

import pytest
from conftest import tiny_pipeline
from huggingface_hub import constants
from repositories import push

from dit_hf import upload
from dit_hf.upload import check_repo_id, is_hub_id


@pytest.fixture
def folder(tmp_path):
    """A pipeline that fits diffusers' own, too."""
    tiny_pipeline(rotary=False).save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def test_a_push_that_is_interrupted_changes_nothing_and_is_resumed(hub, folder, capsys):
    hub.broken = {"POST */commit/*"}
    code, line = push(capsys, folder, "you/faces")
    assert code == 1
    assert line.startswith("dit-hf push: error: you/faces: ")
    assert line.endswith("nothing was changed there, and a second call sends only what is missing")
    assert set(hub.repositories["you/faces"]) == {".gitattributes"}
    assert len(hub.stored) == 3  # two files of weights and the image grid have been uploaded
    assert sum(request.startswith("PUT") for request in hub.requests) == 3  # and were sent once in three attempts
    hub.broken, hub.requests = set(), []
    assert push(capsys, folder, "you/faces")[0] == 0
    assert not any(request.startswith("PUT") for request in hub.requests)
    assert "model_index.json" in hub.repositories["you/faces"]


def test_a_refusal_of_the_hub_is_one_line(hub, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, line = push(capsys, folder, "you/faces")
    assert (code, line) == (1, "dit-hf push: error: you/faces: no valid token; log in with `hf auth login`")
    monkeypatch.delenv("HF_TOKEN")
    assert push(capsys, folder, "you/faces") == (code, line)
    assert hub.repositories == {}
    code, line = push(capsys, folder, "no such/name!")
    assert code == 1
    assert "no such/name!" in line
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(capsys, folder, "you/faces")[0] == 1


def test_a_hub_that_never_answers_is_one_line(hub, folder, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(upload, "ANSWER_SECONDS", 0.5)
        code, line = push(capsys, folder, "you/faces")
    assert code == 1
    assert f"you/faces: {endpoint} cannot be reached (" in line


def test_without_a_network_nothing_is_tried_again(folder, capsys, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr(upload, "_with_retries", lambda attempt: pytest.fail("would wait for a minute"))
    code, line = push(capsys, folder, "you/faces")
    assert code == 1
    assert line.startswith("dit-hf push: error: you/faces: http://127.0.0.1:9 cannot be reached (")
    assert line.endswith("nothing was changed there")


def test_ids_of_repositories():
    assert all(is_hub_id(name) for name in ("a/b", "you/x-1.0"))
    assert not any(is_hub_id(name) for name in ("a/b/c", "/a", "./a", "a", "you/my faces", None))
    check_repo_id("you/faces", "push_to_hub")
    with pytest.raises(ValueError, match=r"push_to_hub faces: expected OWNER/NAME, such as me/my-faces"):
        check_repo_id("faces", "push_to_hub")
