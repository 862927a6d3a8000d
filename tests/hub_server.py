"""A Hub on the loopback interface, for tests: serves local folders as model and data set
repositories and keeps what is pushed."""

import base64
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

DATE = "2026-01-01T00:00:00.000Z"
CODES = {401: "", 403: "", 404: "RepoNotFound", 429: "", 500: ""}


class Repo:
    """The files of one repository: revision -> name -> path on disk or bytes."""

    def __init__(
        self, revisions: dict[str, dict[str, Path | bytes]], kind: str, private: bool = False
    ) -> None:
        self.revisions, self.kind, self.private = revisions, kind, private

    def commit(self, revision: str) -> str:
        """A commit hash that is a function of the names and contents."""
        digest = hashlib.sha1(self.kind.encode())
        for name, content in sorted(self.revisions[revision].items()):
            digest.update(name.encode() + b"\0" + content_of(content))
        return digest.hexdigest()

    def resolve(self, revision: str) -> str | None:
        """The name of the revision that a user calls by name, ``refs/...`` or commit hash."""
        return next(
            (
                name
                for name in self.revisions
                if revision in (name, f"refs/heads/{name}", self.commit(name))
            ),
            None,
        )

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Everything that a revision holds."""
        return {name: content_of(content) for name, content in self.revisions[revision].items()}


def content_of(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


class Hub:
    """``with Hub() as hub: hub.add("someone/tiny-sd", folder)``; then run something with
    ``hub.environment(cache)``.

    Attributes:
        requests: (method, path without query, authorization header) of every request, in order.
        pushed: names of the files of every commit received, per repository id.
        token: the one token that is accepted; None: any, and none is needed to read.
        user: whom the token belongs to.
        large_from: files of at least so many bytes are pushed as large files (LFS); None: none is.
    """

    def __init__(
        self, *, token: str | None = None, user: str = "tester", large_from: int | None = None
    ) -> None:
        self.token, self.user, self.large_from = token, user, large_from
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.pushed: dict[str, list[list[str]]] = {}
        self.faults: list[tuple[re.Pattern[str], int, str, list[int]]] = []
        self.large: dict[str, bytes] = {}
        self.lock = threading.RLock()

    def __enter__(self) -> "Hub":
        hub = self
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def add(
        self,
        name: str,
        folder: Path,
        *,
        kind: str = "model",
        revision: str = "main",
        private: bool = False,
    ) -> None:
        """Serve a folder under a name of the Hub's form; ``kind`` is model or dataset."""
        files: dict[str, Path | bytes] = {
            p.relative_to(folder).as_posix(): p
            for p in sorted(folder.rglob("*"))
            if p.is_file() and not p.name.startswith(".")
        }
        self.repos.setdefault((kind, name), Repo({}, kind, private)).revisions[revision] = files

    def answer(
        self, pattern: str, status: int, *, code: str | None = None, times: int = 10**9
    ) -> None:
        """Answer requests whose ``METHOD /path`` matches ``pattern`` with an error status, so many
        times; ``code``: the Hub's error code, e.g. GatedRepo."""
        self.faults.append(
            (re.compile(pattern), status, CODES.get(status, "") if code is None else code, [times])
        )

    def received(self, name: str, kind: str = "model") -> dict[str, bytes]:
        """The files of a repository after all pushes."""
        return self.repos[(kind, name)].files()

    def environment(self, home: Path, *, token: str | None = None) -> dict[str, str]:
        """What a process needs in its environment to take this server for the Hub and ``home`` for
        its cache; no other credentials."""
        mine = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("HF_", "HUGGING_FACE"))
            and k not in ("TRANSFORMERS_CACHE", "XDG_CACHE_HOME")
        }
        hub = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return mine | hub | ({"HF_TOKEN": token} if token else {})


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body in one packet
    disable_nagle_algorithm = True
    routes: ClassVar[list[tuple[str, re.Pattern[str], Callable[..., None]]]] = []

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do(self) -> None:
        """Record, check the token, answer."""
        self.body = self.read_body()
        url = urlsplit(self.path)
        path, self.query = url.path, parse_qs(url.query)
        self.sent = self.headers.get("authorization", "")
        with self.hub.lock:
            self.hub.requests.append((self.command, unquote(path), self.sent))
            for pattern, status, code, left in self.hub.faults:
                if left[0] > 0 and pattern.search(f"{self.command} {unquote(path)}"):
                    left[0] -= 1
                    return self.refuse(status, code)
            if self.hub.token and self.sent and self.sent != f"Bearer {self.hub.token}":
                return self.refuse(401, "", "Invalid credentials in Authorization header")
            method = "GET" if self.command == "HEAD" else self.command
            for wanted, route, action in self.routes:
                if method == wanted and (match := route.fullmatch(path)):
                    return action(
                        self,
                        **{k: unquote(v) for k, v in match.groupdict().items() if v is not None},
                    )
        self.refuse(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def read_body(self) -> bytes:
        """The request's body, whether its length is said or it comes in chunks."""
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        out = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def reply(
        self,
        body: bytes,
        status: int = 200,
        headers: dict[str, str] | None = None,
        kind: str = "application/json",
    ) -> None:
        """Send; to HEAD only the headers."""
        self.send_response(status)
        for key, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any, status: int = 200) -> None:
        """Send JSON."""
        self.reply(json.dumps(value).encode(), status)

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        """Send an error as the Hub words it."""
        headers = ({"X-Error-Code": code} if code else {}) | (
            {"X-Error-Message": message} if message else {}
        )
        self.reply(
            json.dumps({"error": message or code or f"status {status}"}).encode(), status, headers
        )

    def find(self, kind: str | None, name: str, revision: str = "main") -> tuple[Repo, str] | None:
        """The repository and the name of its revision, or None after having refused."""
        repo = self.hub.repos.get(((kind or "models").rstrip("s"), name))
        if repo is None or (repo.private and not self.sent):
            return self.refuse(404 if self.sent else 401, "RepoNotFound")
        known = repo.resolve(revision)
        return (repo, known) if known is not None else self.refuse(404, "RevisionNotFound")

    def allowed(self) -> bool:
        """Whether the request may write."""
        if not self.sent:
            self.refuse(401, "", "Invalid username or password.")
        return bool(self.sent)


def route(method: str, path: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register an answer: ``{name}`` stands for a repository's, ``{rev}`` for one path segment,
    ``{file}`` for the rest."""
    pieces = {
        "{kind}": "(?P<kind>models|datasets)",
        "{name}": "(?P<name>[^/]+/[^/]+)",
        "{rev}": "(?P<rev>[^/]+)",
        "{file}": "(?P<file>.+)",
        "{oid}": "(?P<oid>[0-9a-f]+)",
    }
    pattern = re.sub(r"\{\w+\}", lambda m: pieces[m[0]], path)

    def keep(action: Callable[..., None]) -> Callable[..., None]:
        Handler.routes.append((method, re.compile(pattern), action))
        return action

    return keep


def entry(name: str, content: Path | bytes) -> dict[str, Any]:
    """A file as listings have it."""
    data = content_of(content)
    return {"type": "file", "path": name, "oid": git_digest(data), "size": len(data)}


def git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@route("GET", "/api/{kind}/{name}(?:/revision/{rev})?")
def repo_info(self: Handler, kind: str, name: str, rev: str = "main") -> None:
    if found := self.find(kind, name, rev):
        repo, known = found
        files = [{"rfilename": n} for n in sorted(repo.revisions[known])]
        common = {
            "_id": "0",
            "id": name,
            "author": name.split("/")[0],
            "sha": repo.commit(known),
            "lastModified": DATE,
            "createdAt": DATE,
            "private": repo.private,
            "gated": False,
        }
        self.json(
            common
            | {
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": files,
                "modelId": name,
            }
        )


@route("GET", "/api/{kind}/{name}/tree/{rev}(?:/{file})?")
def tree(self: Handler, kind: str, name: str, rev: str, file: str = "") -> None:
    if found := self.find(kind, name, rev):
        repo, known = found
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        inside = {
            n: c
            for n, c in sorted(repo.revisions[known].items())
            if not file or n.startswith(f"{file}/")
        }
        if file and not inside:
            return self.refuse(404, "EntryNotFound")
        start = len(file) + 1 if file else 0
        folders = {
            n[: start + i] for n in inside for i, letter in enumerate(n[start:]) if letter == "/"
        }
        entries = [
            {"type": "directory", "path": f, "oid": git_digest(f.encode()), "size": 0}
            for f in sorted(folders)
        ] + [entry(n, c) for n, c in inside.items()]
        self.json([e for e in entries if deep or "/" not in e["path"][start:]])


@route("POST", "/api/{kind}/{name}/paths-info/{rev}")
def paths_info(self: Handler, kind: str, name: str, rev: str) -> None:
    if found := self.find(kind, name, rev):
        repo, known = found
        sent = (
            json.loads(self.body)
            if self.body.lstrip().startswith(b"{")
            else parse_qs(self.body.decode())
        )
        paths, files, out = sent.get("paths", []), repo.revisions[known], []
        for path in [paths] if isinstance(paths, str) else paths:
            if path in files:
                out.append(entry(path, files[path]))
            elif any(n.startswith(f"{path}/") for n in files):
                out.append(
                    {"type": "directory", "path": path, "oid": git_digest(path.encode()), "size": 0}
                )
        self.json(out)


@route("GET", "/(?:{kind}/)?{name}/resolve/{rev}/{file}")
def resolve(self: Handler, name: str, rev: str, file: str, kind: str = "models") -> None:
    if found := self.find(kind, name, rev):
        repo, known = found
        commit = {"X-Repo-Commit": repo.commit(known)}
        if file not in repo.revisions[known]:
            body = b'{"error": "Entry not found"}'
            return self.reply(body, 404, commit | {"X-Error-Code": "EntryNotFound"})
        data = content_of(repo.revisions[known][file])
        headers = commit | {"ETag": f'"{git_digest(data)}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        if wanted and self.command == "GET":
            first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            return self.reply(
                data[first : last + 1],
                206,
                headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"},
                "application/octet-stream",
            )
        self.reply(data, 200, headers, "application/octet-stream")


@route("GET", "/api/whoami-v2")
def whoami(self: Handler) -> None:
    if not self.sent:
        return self.refuse(401, "", "Invalid credentials in Authorization header")
    self.json(
        {
            "type": "user",
            "id": "0",
            "name": self.hub.user,
            "fullname": self.hub.user,
            "orgs": [],
            "auth": {
                "type": "access_token",
                "accessToken": {"displayName": "test", "role": "write"},
            },
        }
    )


@route("POST", "/api/repos/create")
def create(self: Handler) -> None:
    if self.allowed():
        wanted = json.loads(self.body)
        name, kind = (
            f"{wanted.get('organization') or self.hub.user}/{wanted['name']}",
            wanted.get("type") or "model",
        )
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.hub.repos:
            return self.json(
                {"error": "You already created this model repo", "url": url, "id": name}, 409
            )
        self.hub.repos[(kind, name)] = Repo(
            {"main": {}}, kind, wanted.get("visibility") == "private" or bool(wanted.get("private"))
        )
        self.json({"url": url, "name": name, "id": name})


@route("GET", "/api/{kind}/{name}/auth-check(?:/write)?")
def auth_check(self: Handler, kind: str, name: str) -> None:
    if self.allowed() and self.find(kind, name):
        self.json({})


@route("POST", "/api/validate-yaml")
def validate_yaml(self: Handler) -> None:
    self.json({"errors": [], "warnings": []})


@route("POST", "/api/{kind}/{name}/preupload/{rev}")
def preupload(self: Handler, kind: str, name: str, rev: str) -> None:
    if self.allowed() and (found := self.find(kind, name, rev)):
        repo, known = found
        out = []
        for file in json.loads(self.body)["files"]:
            large = self.hub.large_from is not None and file["size"] >= self.hub.large_from
            old = repo.revisions[known].get(file["path"])
            data = None if old is None else content_of(old)
            oid = (
                None
                if data is None
                else hashlib.sha256(data).hexdigest()
                if large
                else git_digest(data)
            )
            out.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": oid,
                }
            )
        self.json({"files": out})


@route("POST", "/(?:datasets/)?{name}.git/info/lfs/objects/batch")
def large_batch(self: Handler, name: str) -> None:
    if self.allowed():
        objects = json.loads(self.body)["objects"]
        actions = {
            "upload": lambda oid: {"href": f"{self.hub.url}/large/{oid}"},
            "verify": lambda oid: {"href": f"{self.hub.url}/large/{oid}/verify"},
        }
        self.json(
            {
                "transfer": "basic",
                "objects": [
                    {
                        **o,
                        **(
                            {}
                            if o["oid"] in self.hub.large
                            else {"actions": {k: f(o["oid"]) for k, f in actions.items()}}
                        ),
                    }
                    for o in objects
                ],
            }
        )


@route("PUT", "/large/{oid}")
def large_put(self: Handler, oid: str) -> None:
    if hashlib.sha256(self.body).hexdigest() != oid:
        return self.refuse(400)
    self.hub.large[oid] = self.body
    self.reply(b"")


@route("POST", "/large/{oid}/verify")
def large_verify(self: Handler, oid: str) -> None:
    self.json({}) if len(self.hub.large.get(oid, b"")) == json.loads(self.body)[
        "size"
    ] else self.refuse(400)


@route("POST", "/api/{kind}/{name}/commit/{rev}")
def commit(self: Handler, kind: str, name: str, rev: str) -> None:
    if self.allowed() and (found := self.find(kind, name, rev)):
        repo, known = found
        files, names = dict(repo.revisions[known]), []
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"])
            if "path" in value:
                names.append(value["path"])
        repo.revisions[known] = files
        self.hub.pushed.setdefault(name, []).append(names)
        self.json(
            {
                "commitUrl": f"{self.hub.url}/{name}/commit/{repo.commit(known)}",
                "commitOid": repo.commit(known),
                "success": True,
            }
        )


if __name__ == "__main__":
    with Hub() as served:
        for argument in sys.argv[1:]:
            title, _, place = argument.partition("=")
            served.add(
                title.removeprefix("datasets/"),
                Path(place),
                kind="dataset" if title.startswith("datasets/") else "model",
            )
        print(served.url, flush=True)
        served.thread.join()
