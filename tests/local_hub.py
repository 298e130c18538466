"""A small Hub on this machine: what `create_repo`, `upload_folder`, `snapshot_download` and `from_pretrained` need."""

import base64
import contextlib
import fnmatch
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test"


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Hub:
    """Repositories as files in memory: `repositories["datasets/you/x"]["README.md"]` is bytes.

    Branches other than main are `repositories["you/x@name"]`. Large files come by LFS, as on the Hub: `stored` holds
    their content by SHA-256 whether they are in a commit or not.

    Attributes:
        broken: Patterns of requests (`POST /api/...`) to which the connection is closed without an answer.
        answers: By such patterns, refusals that are given once each, in order: status, error code, other headers.
        denied: By name of a repository, the status and error code of every request for it.
        large: Suffixes of the files that go by LFS.
        requests: All that were made.
        sent: Bytes of each file that were sent.
        commits: Repository (a key of `repositories`) and message of all that were made.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}
        self.broken: set[str] = set()
        self.answers: dict[str, list[tuple[int, str, dict[str, str]]]] = {}
        self.denied: dict[str, tuple[int, str]] = {}
        self.large: tuple[str, ...] = (".safetensors", ".png")
        self.commits: list[tuple[str, str]] = []
        self.requests: list[str] = []
        self.sent: Counter[str] = Counter()
        self.endpoint = ""

    def environment(self, token: str = TOKEN) -> dict[str, str]:
        """What a process needs in its environment to talk to this Hub."""
        return {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def key(self, name: str, revision: str) -> str:
        """Of `repositories`, by a branch or by the name of its commit."""
        keys = [key for key in self.repositories if key.partition("@")[0] == name]
        by_commit = {self.commit(key): key for key in keys}
        return by_commit.get(revision, name if revision == "main" else f"{name}@{revision}")

    def commit(self, key: str) -> str:
        """The name of a branch's newest commit (the only one that is kept), which changes with its content."""
        digest = hashlib.sha1(key.encode())
        for path, content in sorted(self.repositories[key].items()):
            digest.update(path.encode() + hashlib.sha1(content).digest())
        return digest.hexdigest()


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def answer(self, status: int, content: dict | list | bytes, **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def not_found(self, name: str, what: str) -> None:
            code = what if any(key.partition("@")[0] == name for key in hub.repositories) else "RepoNotFound"
            self.answer(404, {"error": f"{code} {name}"}, X_Error_Code=code)

        def is_broken(self) -> bool:
            request = f"{self.command} {urlsplit(self.path).path}"
            hub.requests.append(request)
            self.close_connection = any(fnmatch.fnmatch(request, pattern) for pattern in hub.broken)
            return self.close_connection or self.is_refused(request)

        def is_refused(self, request: str) -> bool:
            """Answer a request that `answers` or `denied` refuse."""
            names = request.partition(" ")[2].removeprefix("/api/").removeprefix("models/").strip("/")
            for name, (status, code) in hub.denied.items():
                if f"{names}/".startswith(f"{name}/"):
                    self.answer(status, {"error": code}, X_Error_Code=code)
                    return True
            for pattern, answers in hub.answers.items():
                if answers and fnmatch.fnmatch(request, pattern):
                    status, code, headers = answers.pop(0)
                    self.answer(status, {"error": code}, X_Error_Code=code, **headers)
                    return True
            return False

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def do_PUT(self) -> None:
            content = self.body()
            if not self.is_broken():
                oid = self.path.removeprefix("/store/")
                if hashlib.sha256(content).hexdigest() != oid:
                    self.answer(400, {"error": "other content than announced"})
                    return
                hub.stored[oid] = content
                self.answer(200, b"")

        def do_POST(self) -> None:
            body, path = self.body(), unquote(urlsplit(self.path).path)
            if self.is_broken():
                return
            if path == "/api/validate-yaml":
                self.answer(200, {"errors": [], "warnings": []})
            elif "/paths-info/" in path:
                name, _, revision = self.repository(path).partition("/paths-info/")
                # The client sends a form, or JSON.
                wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
                self.answer(200, self.listed(hub.key(name, revision), lambda listed: listed in wanted))
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer(401, {"error": "Invalid credentials in Authorization header"})
            elif path == "/api/repos/create":
                self.create(json.loads(body))
            elif path.endswith(".git/info/lfs/objects/batch"):
                objects = [self.lfs(wanted) for wanted in json.loads(body)["objects"]]
                self.answer(200, {"transfer": "basic", "objects": objects})
            elif "/branch/" in path:
                name, _, branch = self.repository(path).partition("/branch/")
                if branch.startswith("refs/"):
                    self.answer(400, {"error": "Invalid reference for a branch"})
                    return
                hub.repositories.setdefault(f"{name}@{branch}", dict(hub.repositories[name]))
                self.answer(200, {})
            elif "/preupload/" in path:
                name, _, revision = self.repository(path).partition("/preupload/")
                if hub.key(name, revision) not in hub.repositories:
                    self.not_found(name, "RevisionNotFound")
                    return
                files = [f["path"] for f in json.loads(body)["files"]]
                modes = ["lfs" if p.endswith(hub.large) else "regular" for p in files]
                answers = zip(files, modes, strict=True)
                self.answer(200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in answers]})
            elif "/commit/" in path:
                self.commit(*self.repository(path).split("/commit/"), body)
            else:
                self.answer(404, {"error": path})

        def create(self, wanted: dict) -> None:
            owner, kind = wanted.get("organization") or "you", wanted.get("type", "model")
            prefix, name = "" if kind == "model" else f"{kind}s/", f"{owner}/{wanted['name']}"
            url = {"url": f"{hub.endpoint}/{prefix}{name}", "name": name}
            if prefix + name in hub.repositories:
                self.answer(409, {"error": "You already created this repo", **url})
                return
            hub.repositories[prefix + name] = {".gitattributes": b"*.safetensors filter=lfs"}
            hub.private[name] = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.answer(200, url)

        def lfs(self, wanted: dict) -> dict:
            upload = {"upload": {"href": f"{hub.endpoint}/store/{wanted['oid']}", "header": {}}}
            return wanted if wanted["oid"] in hub.stored else {**wanted, "actions": upload}

        def commit(self, name: str, revision: str, body: bytes) -> None:
            key, entries = hub.key(name, revision), [json.loads(line) for line in body.splitlines()]
            (header,) = (entry["value"] for entry in entries if entry["key"] == "header")
            if header.get("parentCommit") not in (None, hub.commit(key)):
                self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
                return
            pull_request = {}
            if "create_pr=1" in urlsplit(self.path).query:
                number = 1 + sum(other.startswith(f"{name}@refs/pr/") for other in hub.repositories)
                pull_request = {"pullRequestUrl": f"{hub.endpoint}/{name}/discussions/{number}"}
                hub.repositories[f"{name}@refs/pr/{number}"] = dict(hub.repositories[key])
                key = f"{name}@refs/pr/{number}"
            hub.commits.append((key, header["summary"]))
            repository = hub.repositories[key]
            for entry in entries:
                value = entry["value"]
                if entry["key"] == "file":
                    repository[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    repository[value["path"]] = hub.stored[value["oid"]]
                elif entry["key"] == "deletedFile":
                    del repository[value["path"]]
            oid = hub.commit(key)
            url = f"{hub.endpoint}/{name}/commit/{oid}"
            self.answer(200, {"commitUrl": url, "commitOid": oid, **pull_request})

        def repository(self, path: str) -> str:
            return path.removeprefix("/api/").removeprefix("models/")

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path  # in which a revision such as refs/pr/1 is quoted
            if self.is_broken():
                return
            if path == "/api/whoami-v2":
                self.answer(200, {"name": "you", "type": "user", "auth": {"accessToken": {"role": "write"}}})
            elif "/resolve/" in path:
                name, _, rest = path[1:].partition("/resolve/")
                key = hub.key(name, unquote(rest.partition("/")[0]))
                content = hub.repositories.get(key, {}).get(unquote(rest.partition("/")[2]))
                if content is None:
                    self.not_found(name, "EntryNotFound" if key in hub.repositories else "RevisionNotFound")
                else:
                    etag = hashlib.sha256(content).hexdigest()
                    headers = {"ETag": f'"{etag}"', "X_Repo_Commit": hub.commit(key)}
                    status, wanted = 200, self.headers.get("Range", "")
                    if wanted.startswith("bytes="):  # both ends belong to it
                        first, _, last = wanted.removeprefix("bytes=").partition("-")
                        content, status = content[int(first) : int(last) + 1 if last else None], 206
                    if self.command == "GET":
                        hub.sent[f"{name}/{unquote(rest.partition('/')[2])}"] += len(content)
                    self.answer(status, content, **headers)
            elif path.startswith("/api/"):
                self.describe(path)
            else:
                self.answer(404, b"", X_Error_Code="RepoNotFound")

        def listed(self, key: str, is_listed: Callable[[str], bool]) -> list[dict]:
            """The files of a repository and the folders above them, as `paths-info` and `tree` describe them."""
            files = hub.repositories.get(key, {})
            folders = {str(folder): b"" for p in files for folder in PurePosixPath(p).parents if str(folder) != "."}
            return [
                {"type": "file" if p in files else "directory", "path": p, "size": len(c), "oid": sha1(c)}
                for p, c in (folders | files).items()
                if is_listed(p)
            ]

        def describe(self, path: str) -> None:
            kind = "/tree/" if "/tree/" in path else "/revision/"
            name, _, revision = self.repository(path).partition(kind)
            key = hub.key(name, unquote(revision.partition("/")[0]) or "main")
            files = hub.repositories.get(key)
            if files is None:
                self.not_found(name, "RevisionNotFound")
            elif kind == "/tree/":
                folder = unquote(revision.partition("/")[2])
                own, below = f"{folder}/" if folder else "", "recursive=true" in urlsplit(self.path).query.lower()
                listed = self.listed(key, lambda p: p.startswith(own) and (below or "/" not in p.removeprefix(own)))
                self.answer(200, listed)
            else:
                siblings = [{"rfilename": p, "size": len(c)} for p, c in files.items()]
                facts = {
                    "id": name.removeprefix("datasets/").removeprefix("spaces/"),
                    "sha": hub.commit(key),
                    "siblings": siblings,
                    "tags": [],
                }
                private = hub.private.get(name.removeprefix("datasets/").removeprefix("spaces/"), False)
                self.answer(200, {**facts, "private": private, "disabled": False, "downloads": 0, "likes": 0})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
