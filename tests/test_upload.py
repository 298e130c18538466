"""Uploads to a small Hub of our own: whole or not at all, and refused in one line."""

import json
import socket
from pathlib import Path

import pytest
from conftest import tiny_pipeline
from huggingface_hub import HfApi, ModelCard, constants, hf_api
from repositories import push

from dit_hf import hub_ids, upload
from dit_hf.card_blocks import LICENSE
from dit_hf.hub.push import push as push_model
from dit_hf.hub.push import upload as upload_model
from dit_hf.upload import PUSHED_FILES, Content, upload_folder


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A folder to upload. Not to be written to."""
    folder = tmp_path_factory.mktemp("upload")
    tiny_pipeline(rotary=False).save_pretrained(folder / "mine")
    push_model(str(folder / "mine"), output_dir=str(folder / "faces"))
    return folder / "faces"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, repository):
    """Another folder of the same model: its weights in shards, and a licence that was named."""
    folder = tmp_path_factory.mktemp("upload") / "faces"
    push_model(str(repository.parent / "mine"), output_dir=str(folder), max_shard_size="60KB", license="cc0-1.0")
    return folder


@pytest.fixture
def folder(tmp_path):
    """A pipeline that fits diffusers' own, too."""
    tiny_pipeline(rotary=False).save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def test_a_push_that_is_interrupted_changes_nothing_and_is_resumed(hub, repository):
    hub.broken = {"POST */commit/*"}
    message = r"you/faces: .*; of this push there is all or nothing, and a second call sends only what is missing"
    with pytest.raises(OSError, match=message):
        upload_model(repository, "you/faces")
    assert set(hub.repositories["you/faces"]) == {".gitattributes"}
    assert len(hub.stored) == 3  # two files of weights and the image grid have been uploaded
    assert sum(request.startswith("PUT") for request in hub.requests) == 3  # and were sent once in three attempts
    hub.broken, hub.requests = set(), []
    upload_model(repository, "you/faces")
    assert not any(request.startswith("PUT") for request in hub.requests)
    assert "model_index.json" in hub.repositories["you/faces"]


def test_a_refusal_of_the_hub_is_one_line(hub, folder, repository, capsys, monkeypatch):
    code, line = push(capsys, folder, "no such/name!")
    assert code == 1
    assert "REPO_ID no such/name!: expected OWNER/NAME" in line
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, line = push(capsys, folder, "you/faces")
    assert (code, line) == (1, "dit-hf push: error: you/faces: no valid token; log in with `hf auth login`")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="you/faces: no valid token; log in with `hf auth login`"):
        upload_model(repository, "you/faces")
    assert hub.repositories == {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"cannot be reached .*offline"):
        upload_model(repository, "you/faces")


def test_a_hub_that_never_answers_is_one_line(hub, folder, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(hub_ids, "ANSWER_SECONDS", 0.5)
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


def of_weights(files):
    """The files of sharded weights."""
    return {name for name in files if "-of-" in name or name.endswith(".index.json")}


def card_of(hub):
    return ModelCard(hub.repositories["you/faces"]["README.md"].decode(), ignore_metadata_errors=False)


def test_files_of_others_in_the_folders_of_a_push_stay(hub, repository, sharded):
    upload_model(sharded, "you/faces")
    files = hub.repositories["you/faces"]
    shards = of_weights(files)
    assert len(shards) > 3
    mine = dict.fromkeys(("transformer/adapter.safetensors", "vae/notes.txt", "evaluation/mine.json", "a.txt"), b"x")
    files |= mine
    upload_model(repository, "you/faces")
    files = hub.repositories["you/faces"]
    assert mine.items() <= files.items()
    # What the earlier push wrote is gone, and the list is of this one.
    assert not shards & files.keys()
    assert {*json.loads(files[PUSHED_FILES])["files"]} == files.keys() - mine.keys() - {".gitattributes"}


def test_of_a_push_without_a_list_the_weights_alone_are_replaced(hub, repository, sharded, capsys):
    upload_model(sharded, "you/faces")
    files = hub.repositories["you/faces"]
    del files[PUSHED_FILES]  # as version 0.1.0 left it
    files |= {"evaluation/evaluation.json": b"{}", "vae/notes.txt": b"x"}
    upload_model(repository, "you/faces")
    assert "you/faces: no earlier push has listed its files; kept: vae/notes.txt" in capsys.readouterr().out
    files = hub.repositories["you/faces"]
    assert not of_weights(files)
    assert "evaluation/evaluation.json" not in files
    assert files["vae/notes.txt"] == b"x"


@pytest.mark.parametrize("failure", [{"POST */commit/*"}, set()], ids=["interrupted", "whole"])
def test_with_xet_a_push_is_one_commit_too(hub, repository, sharded, monkeypatch, failure):
    """As the client uploads by default, which may make several commits and deletes in the first."""
    pipeline = pytest.importorskip("huggingface_hub._upload_pipeline")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert hf_api.is_xet_available()
    monkeypatch.setattr(pipeline, "MAX_COMMIT_INTERVAL", 0)
    monkeypatch.setattr(pipeline, "PREUPLOAD_BATCH_SIZE", 4)
    hub.large = ()  # there is no storage of Xet here
    upload_model(sharded, "you/faces")
    assert len(hub.commits) == 1
    before = dict(hub.repositories["you/faces"])
    hub.broken = failure
    if failure:
        with pytest.raises(OSError, match="of this push there is all or nothing, and a second call sends only what"):
            upload_model(repository, "you/faces")
        assert hub.repositories["you/faces"] == before
    else:
        upload_model(repository, "you/faces")
        assert len(hub.commits) == 2
        files = hub.repositories["you/faces"]
        assert of_weights(before)
        assert not of_weights(files)
        assert files["README.md"] == (repository / "README.md").read_bytes()


def test_large_files_go_up_in_parts_that_are_not_sent_again(hub, repository, monkeypatch):
    weights = [path for path in repository.rglob("*") if path.suffix in hub.large]
    monkeypatch.setattr(upload, "PART_BYTES", 1)  # a part holds one file at least
    sent = []
    original = HfApi.preupload_lfs_files

    def one_part(self, repo_id, additions, **options):
        sent.extend(file.path_in_repo for file in additions if Path(file.path_in_repo).suffix in hub.large)
        if len(sent) == 2:
            sent.append("interrupted")
            raise KeyboardInterrupt
        return original(self, repo_id, additions, **options)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", one_part)
    with pytest.raises(KeyboardInterrupt):
        upload_model(repository, "you/faces")
    assert set(hub.repositories["you/faces"]) == {".gitattributes"}
    stored = len(hub.stored)
    assert 0 < stored < len(weights)
    hub.requests.clear()
    upload_model(repository, "you/faces")
    assert sum(request.startswith("PUT") for request in hub.requests) == len(weights) - stored
    assert len(hub.commits) == 1


@pytest.mark.parametrize(
    ("headers", "waits"),
    [
        ({"Retry_After": "7"}, [7.0]),
        ({"RateLimit": '"api";r=0;t=55'}, [55.0]),
        ({"RateLimit": '"api";r=3;t=55'}, [0.0]),
        ({}, [0.0]),
        ({"Retry_After": "3600"}, None),
    ],
)
def test_a_commit_is_retried_when_the_hub_asks_for_it(hub, repository, monkeypatch, headers, waits):
    slept = []
    monkeypatch.setattr(upload.time, "sleep", slept.append)
    hub.answers["POST */commit/*"] = [(429, "", headers)]
    if waits is None:
        with pytest.raises(ValueError, match=r"429.*; nothing was changed there"):
            upload_model(repository, "you/faces")
        assert slept == []
    else:
        upload_model(repository, "you/faces")
        assert slept == waits
        assert len(hub.commits) == 1


def test_a_commit_of_somebody_else_is_not_overwritten_unseen(hub, tmp_path, monkeypatch):
    """A push that was overtaken compares with the newer commit: here, with a card that was edited meanwhile."""
    (tmp_path / "README.md").write_text("---\nlicense: unknown\n---\n\nNew.\n")
    original, seen = HfApi.create_commit, []

    def overtaken(self, *args, **options):
        if not seen:
            hub.repositories["you/faces"]["README.md"] = b"---\nlicense: mit\n---\n\nMine.\n"
        seen.append(options["parent_commit"])
        return original(self, *args, **options)

    monkeypatch.setattr(HfApi, "create_commit", overtaken)
    upload_folder(tmp_path, "you/faces", Content("model", "Upload", lambda repository: None, lambda name: False))
    assert len(seen) == 2
    assert seen[0] != seen[1]
    assert hub.repositories["you/faces"]["README.md"] == b"---\nlicense: mit\n---\n\nMine.\n\nNew.\n"


def test_an_edited_card_keeps_its_owners_words_and_licence(hub, repository, sharded, capsys):
    upload_model(repository, "you/faces")
    files = hub.repositories["you/faces"]
    edited = files["README.md"].decode().replace("license: unknown", "license: mit")
    files["README.md"] = edited.replace("# faces\n", "# faces\n\nFor my aunt.\n").encode()
    upload_model(sharded, "you/faces")
    assert "you/faces: of its card is kept what was changed there: license" in capsys.readouterr().out
    assert card_of(hub).data.license == "mit"
    assert "# faces\n\nFor my aunt.\n" in card_of(hub).content
    # An option counts more than the site, and `overwrite` replaces the card.
    upload_model(sharded, "you/faces", metadata=LICENSE)
    assert card_of(hub).data.license == "cc0-1.0"
    assert "For my aunt." in card_of(hub).content
    upload_model(sharded, "you/faces", overwrite=True)
    assert hub.repositories["you/faces"]["README.md"] == (sharded / "README.md").read_bytes()


def test_a_repository_made_on_the_site_keeps_its_licence(hub, repository):
    hub.repositories["you/faces"] = {".gitattributes": b"", "README.md": b"---\nlicense: mit\n---\n"}
    for _ in range(2):
        upload_model(repository, "you/faces")
        assert card_of(hub).data.license == "mit"
        assert card_of(hub).data.library_name == "diffusers"
        assert card_of(hub).content.count("## Use") == 1


def test_the_card_of_an_earlier_version_is_kept_and_the_way_out_is_named(hub, repository, capsys):
    upload_model(repository, "you/faces")
    files = hub.repositories["you/faces"]
    del files[PUSHED_FILES]
    files["README.md"] = b"---\nlicense: mit\n---\n\n# faces\n\nOf version 0.1.0.\n"
    upload_model(repository, "you/faces")
    assert "delete README.md there to have it written anew" in capsys.readouterr().out
    assert hub.repositories["you/faces"]["README.md"].endswith(b"\n# faces\n\nOf version 0.1.0.\n")
