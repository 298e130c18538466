"""A small Hub on this machine: what `create_repo`, `upload_folder`, `snapshot_download` and `from_pretrained` need."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40


class Hub:
    """Repositories as files in memory: `repositories["datasets/you/x"]["README.md"]` is bytes."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.endpoint = ""

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to talk to this Hub."""
        return {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


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

        def do_POST(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = urlsplit(self.path).path
            if path == "/api/repos/create":
                wanted = json.loads(body)
                owner, kind = wanted.get("organization") or "you", wanted.get("type", "model")
                name = f"{owner}/{wanted['name']}"
                hub.repositories.setdefault(f"datasets/{name}" if kind == "dataset" else name, {})
                hub.private[name] = bool(wanted.get("private")) or wanted.get("visibility") == "private"
                prefix = "datasets/" if kind == "dataset" else ""
                self.answer(200, {"url": f"{hub.endpoint}/{prefix}{name}", "name": name})
            elif path == "/api/validate-yaml":
                self.answer(200, {"errors": [], "warnings": []})
            elif "/preupload/" in path:
                files = json.loads(body)["files"]
                modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
                self.answer(200, {"files": modes})
            elif "/commit/" in path:
                name = self.repository(path.partition("/commit/")[0])
                repository = hub.repositories[name]
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        repository[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                self.answer(200, {"commitUrl": f"{hub.endpoint}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
            else:
                self.answer(404, {"error": path})

        def repository(self, path: str) -> str:
            name = path.removeprefix("/api/")
            return name.removeprefix("models/")

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path == "/api/whoami-v2":
                self.answer(200, {"name": "you", "type": "user", "auth": {"accessToken": {"role": "write"}}})
            elif "/resolve/" in path:
                name, _, rest = path[1:].partition("/resolve/")
                content = hub.repositories.get(name, {}).get(rest.partition("/")[2])
                if content is None:
                    code = "EntryNotFound" if name in hub.repositories else "RepoNotFound"
                    self.answer(404, b"", X_Error_Code=code, X_Repo_Commit=COMMIT)
                else:
                    etag = hashlib.sha256(content).hexdigest()
                    self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
            elif path.startswith("/api/"):
                self.describe(path)
            else:
                self.answer(404, b"", X_Error_Code="RepoNotFound")

        def describe(self, path: str) -> None:
            tree = "/tree/" in path
            name = self.repository(path.partition("/tree/")[0].partition("/revision/")[0])
            files = hub.repositories.get(name)
            if files is None:
                self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            elif tree:
                listed = [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files.items()]
                self.answer(200, listed)
            else:
                siblings = [{"rfilename": p, "size": len(c)} for p, c in files.items()]
                facts = {"id": name.removeprefix("datasets/"), "sha": COMMIT, "siblings": siblings, "tags": []}
                self.answer(200, {**facts, "private": False, "disabled": False, "downloads": 0, "likes": 0})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
