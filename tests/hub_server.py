"""A hub on loopback: as much of the Hub's protocol as huggingface_hub's client speaks when it pushes and pulls models.

Tokens are known by their owner. What a repository holds is a list of commits, each path -> content; large files go into
a store of their own by their SHA-256 first, as they do with Git LFS.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

#: The access token of `somebody`, in tests.
TOKEN = "hf_TheSecretThatNobodyMaySee"

#: Bytes above which a file goes by LFS; safetensors always do.
REGULAR = 1_000_000


@dataclass
class Repository:
    """What is in it: commits, of which the last is `main`."""

    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


@dataclass
class Hub:
    """The state of the server.

    Attributes:
        tokens: token -> its owner.
        organizations: namespace -> owners who may write there.
        repositories: by their full name.
        stored: large files by their SHA-256.
        seen: every request's method and path.
        uploads: how often a large file's upload was begun.
        cut: how many of the next uploads break off in their middle.
        faults: path's beginning -> status of the answers to it.
        fleeting: the same, once each.
        lost: how many of the next commits are made, but not answered.
        read_only: tokens that may not write.
    """

    tokens: dict[str, str] = field(default_factory=dict)
    organizations: dict[str, list[str]] = field(default_factory=dict)
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    uploads: int = 0
    cut: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    fleeting: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    read_only: set[str] = field(default_factory=set)
    address: str = ""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Nothing: the test looks at `seen`."""

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content: Any = None, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, message: str, code: str = "") -> None:
        headers = {"X_Error_Code": code} if code else {}
        self.answer({"error": message}, status, X_Error_Message=message, **headers)

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    @property
    def owner(self) -> str | None:
        return self.hub.tokens.get(self.token)

    def may_write(self, namespace: str) -> bool:
        mine = self.owner is not None and (
            self.owner == namespace or self.owner in self.hub.organizations.get(namespace, [])
        )
        return mine and self.token not in self.hub.read_only

    def do_GET(self) -> None:
        self.dispatch(b"")

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        hub = self.hub
        hub.seen.append(f"PUT {self.path}")
        hub.uploads += 1
        if hub.cut > 0:
            hub.cut -= 1
            self.rfile.read(1000)
            self.close_connection = True
            self.connection.close()
            return
        content = self.body()
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != oid:
            self.refuse(400, "the content is another")
            return
        hub.stored[oid] = content
        self.answer({})

    def do_POST(self) -> None:
        self.dispatch(self.body())

    def dispatch(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.seen.append(f"{self.command} {path}")
        for faults in (self.hub.faults, self.hub.fleeting):
            for beginning in faults:
                if path.startswith(beginning):
                    status = faults[beginning] if faults is self.hub.faults else faults.pop(beginning)
                    self.refuse(status, f"as the test wants it, of {self.headers.get('Authorization')}")
                    return
        for pattern, action in ROUTES:
            if found := re.fullmatch(pattern, path):
                action(self, body, *found.groups())
                return
        self.refuse(404, f"nothing is at {path}")

    # What there is

    def whoami(self, _: bytes) -> None:
        if self.owner is None:
            self.refuse(401, "Invalid credentials in Authorization header")
        else:
            self.answer({"name": self.owner, "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        namespace = asked.get("organization") or self.owner
        name = f"{namespace}/{asked['name']}"
        if not self.may_write(namespace):
            self.refuse(403, f"You don't have the rights to create a model under the namespace {namespace}")
        elif name in self.hub.repositories:
            self.answer({"url": f"{self.hub.address}/{name}", "error": "You already created this model repo"}, 409)
        else:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.repositories[name] = Repository(private)
            self.answer({"url": f"{self.hub.address}/{name}", "name": name})

    def repository(self, name: str, write: bool = False) -> Repository | None:
        found = self.hub.repositories.get(name)
        namespace = name.partition("/")[0]
        mine = self.may_write(namespace)
        if found is None or (found.private and not mine and self.owner != namespace):
            self.refuse(401 if self.owner is None else 404, "Repository not found", "RepoNotFound")
            return None
        if write and not mine:
            self.refuse(403, "Forbidden: you have no right to write to this repository")
            return None
        return found

    def may(self, _: bytes, name: str, write: str | None) -> None:
        if self.repository(name, write is not None) is not None:
            self.answer({})

    def about(self, _: bytes, name: str, revision: str | None = None) -> None:
        if (found := self.repository(name)) is not None:
            files = [{"rfilename": path} for path in sorted(found.files)]
            self.answer({"id": name, "sha": found.sha, "private": found.private, "siblings": files, "tags": []})

    def tree(self, _: bytes, name: str, revision: str, folder: str | None = None) -> None:
        if (found := self.repository(name)) is None:
            return
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in sorted(found.files.items())
            if folder is None or path.startswith(f"{folder}/")
        ]
        if folder is not None and not entries:
            self.refuse(404, "no such folder", "EntryNotFound")
        else:
            self.answer(entries)

    def validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        if "license: none-of-the-hubs" in text:
            self.answer({"errors": [{"message": '"license" must be one of [apache-2.0, mit, ...]'}]}, 400)
        else:
            self.answer({"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str) -> None:
        if self.repository(name, write=True) is None:
            return
        files = []
        for file in json.loads(body)["files"]:
            large = file["size"] > REGULAR or file["path"].endswith(".safetensors")
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        self.answer({"files": files})

    def batch(self, body: bytes, name: str) -> None:
        if self.repository(name, write=True) is None:
            return
        objects = []
        for item in json.loads(body)["objects"]:
            known = item["oid"] in self.hub.stored
            upload = {"upload": {"href": f"{self.hub.address}/lfs/{item['oid']}"}}
            objects.append({**item, **({} if known else {"actions": upload})})
        self.answer({"transfer": "basic", "objects": objects})

    def commit(self, body: bytes, name: str) -> None:
        if (found := self.repository(name, write=True)) is None:
            return
        files = dict(found.files)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                found.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        found.commits.append(files)
        if self.hub.lost > 0:
            self.hub.lost -= 1
            self.refuse(504, "the answer is lost")
            return
        self.answer({"success": True, "commitUrl": f"{self.hub.address}/{name}/commit/1", "commitOid": found.sha})

    def resolve(self, _: bytes, name: str, revision: str, path: str) -> None:
        if (found := self.repository(name)) is None:
            return
        if path not in found.files:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=found.sha)
            return
        content = found.files[path]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(content, ETag=etag, X_Repo_Commit=found.sha, Accept_Ranges="bytes")


NAME = r"([\w.-]+/[\w.-]+)"

ROUTES = (
    (r"/api/whoami-v2", Handler.whoami),
    (r"/api/repos/create", Handler.create),
    (r"/api/validate-yaml", Handler.validate),
    (rf"/api/models/{NAME}/auth-check(/write)?", Handler.may),
    (rf"/api/models/{NAME}", Handler.about),
    (rf"/api/models/{NAME}/revision/(\w+)", Handler.about),
    (rf"/api/models/{NAME}/tree/(\w+)(?:/(.+))?", Handler.tree),
    (rf"/api/models/{NAME}/preupload/main", Handler.preupload),
    (rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (rf"/api/models/{NAME}/commit/main", Handler.commit),
    (rf"/{NAME}/resolve/(\w+)/(.+)", Handler.resolve),
)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub that is served until the context ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
