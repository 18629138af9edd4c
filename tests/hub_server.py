"""A Hugging Face Hub on 127.0.0.1, for the real huggingface_hub client: model repositories, in memory.

It speaks what creating, uploading (small files and LFS) and downloading need, answers errors with the headers of the
real Hub, and fails on demand:

    with FakeHub({"hf_mine": "me"}) as hub:
        hub.fail("PUT", "/lfs/", status=500, times=1)
        ...  # clients with HF_ENDPOINT=hub.url
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

MAX_REQUESTS = 3000  # a client in a loop is stopped


class Lfs(bytes):
    """The content of a file in large file storage."""


@dataclass
class Repo:
    owner: str
    private: bool
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        content = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items())
        sha = hashlib.sha1(json.dumps([len(self.commits), content]).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


@dataclass
class Fault:
    """What happens instead of the right answer to requests of a method to paths with a pattern.

    Attributes:
        status: answered, with `code` as the Hub's error code.
        kind: `status`, `drop` (the connection ends while the request is read), `truncate` (the body ends too early),
            `short` (so does it, and the length in the header says so).
        times: how often.
        after: how many such requests pass before.
    """

    method: str
    pattern: str
    status: int = 500
    kind: str = "status"
    code: str = ""
    times: int = 1000
    after: int = 0


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    token: str | None
    body: bytes


class HubError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class FakeHub:
    def __init__(self, users: dict[str, str]) -> None:
        self.users = users  # by token
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def __enter__(self) -> "FakeHub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Large files come from another host, as with the real Hub: clients tell the two apart, by the name.
        self.cdn_url = f"http://localhost:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method: str, pattern: str, **fault: Any) -> None:
        self._faults.append(Fault(method, pattern, **fault))

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> None:
        self.repos[repo_id] = Repo(repo_id.partition("/")[0], private)
        self.repos[repo_id].commit("main", files)

    def paths(self, method: str, pattern: str = "") -> list[str]:
        return [r.path for r in self.requests if r.method == method and re.search(pattern, r.path)]

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.method == method and re.search(fault.pattern, path) and fault.times > 0:
                    fault.after -= 1
                    if fault.after < 0:
                        fault.times -= 1
                        return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    timeout = 20

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query)
        fault = self.hub.take_fault(self.command, self.route)
        if fault and fault.kind == "drop":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.cut = fault.kind if fault and fault.kind != "status" else ""
        body = self._read_body()
        authorization = self.headers.get("Authorization", "")
        self.token = authorization.removeprefix("Bearer ") or None
        self.hub.requests.append(Request(self.command, self.route, self.token, body))
        try:
            if fault and fault.kind == "status":
                raise HubError(fault.status, fault.code, "planted")
            if len(self.hub.requests) > MAX_REQUESTS:
                raise HubError(400, "", "too many requests")
            if self.token is not None and self.token not in self.hub.users:
                raise HubError(401, "", "Invalid credentials in Authorization header")
            self._dispatch(body)
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self._json({"error": error.message}, error.status, {k: v for k, v in headers.items() if v})

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    # --- Answers ---

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        sent = body[: len(body) // 2] if self.cut else body
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(sent if self.cut == "short" else body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
        if self.cut:
            self.close_connection = True

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    # --- What is asked for ---

    def _dispatch(self, body: bytes) -> None:
        for method, pattern, handle in ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and self.command in method.split():
                handle(self, *match.groups(), **({"body": body} if self.command in ("POST", "PUT") else {}))
                return
        raise HubError(404, "", f"no such route: {self.command} {self.route}")

    def _user(self) -> str:
        if self.token is None:
            raise HubError(401, "", "Invalid username or password.")
        return self.hub.users[self.token]

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        """Who may not see a repository is told that there is none; without a token, by 401, as the Hub does."""
        repo = self.hub.repos.get(repo_id)
        user = self.hub.users.get(self.token or "")
        if repo is None or (repo.private and user != repo.owner):
            raise HubError(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != repo.owner:
            raise HubError(403 if user else 401, "", "you have no right to write here")
        return repo

    def _commit(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise HubError(404, "RevisionNotFound", "Invalid rev id")
        return sha, repo.commits[sha]

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        user = self._user()
        owner = asked.get("organization") or user
        repo_id = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repos and self.hub.repos[repo_id].owner == user:
            self._json(answer | {"error": "You already created this model repo"}, 409)
        elif owner != user:
            raise HubError(403, "", f"you may not create repositories for {owner}")
        else:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.repos[repo_id] = Repo(owner, private)
            self._json(answer)

    def validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        data = yaml.safe_load(match.group(1)) if match else None
        if not isinstance(data, dict):
            self._json({"errors": [{"message": "no metadata"}], "warnings": []}, 400)
            return
        errors = []
        for model in data.get("model-index", []):
            for result in model["results"]:
                if not {"task", "dataset", "metrics"} <= set(result) or not {"name", "type"} <= set(result["dataset"]):
                    errors.append({"message": "model-index is not complete"})
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo_id: str, revision: str, body: bytes) -> None:
        self._commit(self._repo(repo_id, write=True), revision)
        # As .gitattributes say for a new repository, and whatever is large.
        binary = (".safetensors", ".bin", ".png")
        modes = {
            file["path"]: "lfs" if file["path"].endswith(binary) or file["size"] > 10_000_000 else "regular"
            for file in json.loads(body)["files"]
        }
        self._json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def lfs_batch(self, repo_id: str, body: bytes) -> None:
        self._repo(repo_id, write=True)
        objects = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.lfs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{repo_id}/{entry['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, repo_id: str, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "", "the content has another checksum")
        self.hub.lfs[oid] = body
        self._send(b"")

    def commit(self, repo_id: str, revision: str, body: bytes) -> None:
        repo = self._repo(repo_id, write=True)
        files = dict(self._commit(repo, revision)[1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise HubError(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = Lfs(self.hub.lfs[value["oid"]])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        if "create_pr" in self.query:
            sha = repo.commit("refs/pr/1", files)
            url = f"{self.hub.url}/{repo_id}/discussions/1"
        else:
            sha, url = repo.commit(revision, files), None
        self._json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha, "pullRequestUrl": url})

    def branch(self, repo_id: str, name: str, body: bytes) -> None:
        repo = self._repo(repo_id, write=True)
        repo.branches[name] = repo.branches["main"]
        self._json({})

    def info(self, repo_id: str, revision: str | None) -> None:
        repo = self._repo(repo_id)
        sha, files = self._commit(repo, revision or "main")
        siblings = [{"rfilename": name} for name in files]
        about = {"_id": "1", "id": repo_id, "modelId": repo_id, "private": repo.private, "sha": sha, "tags": []}
        self._json(about | {"downloads": 0, "likes": 0, "siblings": siblings})

    def tree(self, repo_id: str, revision: str) -> None:
        _, files = self._commit(self._repo(repo_id), revision)
        entries = []
        for name, data in files.items():
            entry = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            if isinstance(data, Lfs):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        sha, files = self._commit(self._repo(repo_id), revision)
        if path not in files:
            raise HubError(404, "EntryNotFound", "Entry not found")
        data = files[path]
        headers = {"X-Repo-Commit": sha}
        if isinstance(data, Lfs):
            oid = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(data))}
            headers["Location"] = f"{self.hub.cdn_url}/cdn/{oid}"
            self._send(b"", 302, headers)
        else:
            self._send(data, 200, headers | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    def cdn(self, oid: str) -> None:
        data = self.hub.lfs.get(oid)
        if data is None:
            raise HubError(404, "", "no such object")
        start = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", ""))
        if start:
            first = int(start.group(1))
            span = f"bytes {first}-{len(data) - 1}/{len(data)}"
            self._send(data[first:], 206, {"Content-Range": span, "ETag": f'"{oid}"'})
        else:
            self._send(data, 200, {"ETag": f'"{oid}"'})


MODEL = "([^/]+/[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{MODEL}/preupload/(.+)", _Handler.preupload),
    ("POST", f"/api/models/{MODEL}/commit/(.+)", _Handler.commit),
    ("POST", f"/api/models/{MODEL}/branch/(.+)", _Handler.branch),
    ("POST", rf"/{MODEL}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", f"/lfs/{MODEL}/([0-9a-f]+)", _Handler.lfs_put),
    ("GET", f"/api/models/{MODEL}(?:/revision/(.+))?", _Handler.info),
    ("GET", f"/api/models/{MODEL}/tree/([^/]+)", _Handler.tree),
    ("GET HEAD", f"/{MODEL}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET HEAD", "/cdn/([0-9a-f]+)", _Handler.cdn),
]
