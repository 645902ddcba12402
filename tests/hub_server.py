"""A small server on loopback that speaks the part of the Hub's API that downloads use.

It serves folders as repositories, each at one commit, also reachable as `main`. huggingface_hub and datasets find it
through the environment variable HF_ENDPOINT; they themselves are not changed.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

COMMIT = "X-Repo-Commit"


class Repository(NamedTuple):
    kind: str  # "models" or "datasets"
    name: str
    commit: str
    folder: Path

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def children(self, folder: str, recursive: bool) -> list[dict]:
        paths = (self.folder / folder).glob("**/*" if recursive else "*")
        return [self.entry(path.relative_to(self.folder).as_posix()) for path in sorted(paths)]

    def entry(self, name: str) -> dict:
        path = self.folder / name
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        content = path.read_bytes()
        return {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: dict | None = None) -> None:
        path = unquote(urlsplit(self.path).path)
        calls = "(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?"
        api = re.fullmatch(rf"/api/(models|datasets)/([^/]+/[^/]+){calls}", path)
        download = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            kind, name, call, revision, folder = api.groups()
        elif download:
            kind, name, revision, file = "datasets" if download[1] else "models", *download.groups()[1:]
        else:
            return self.fail("EntryNotFound")
        repository = self.server.repositories.get((kind, name))
        if repository is None:
            return self.fail("RepoNotFound", status=401)  # as the Hub does: it may be private
        if revision not in (None, "main", repository.commit):
            return self.fail("RevisionNotFound")
        if download:
            return self.send_file(repository, file)
        if call == "tree":
            return self.send(repository.children(folder or "", recursive="recursive=true" in self.path.lower()))
        if call == "paths-info":
            there = [name for name in body["paths"] if (repository.folder / name).exists()]
            return self.send([repository.entry(name) for name in there])
        siblings = [{"rfilename": name} for name in repository.files()]
        return self.send({"id": name, "sha": repository.commit, "siblings": siblings, "private": False, "tags": []})

    def send_file(self, repository: Repository, file: str) -> None:
        path = repository.folder / file
        if not path.is_file():
            return self.fail("EntryNotFound", commit=repository.commit)
        content = path.read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        return self.send_bytes(content, {"ETag": f'"{etag}"', COMMIT: repository.commit})

    def send(self, value: object) -> None:
        self.send_bytes(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def fail(self, code: str, status: int = 404, commit: str = "") -> None:
        self.send_bytes(b"", {"X-Error-Code": code, COMMIT: commit}, status)

    def send_bytes(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.server.requests.append(f"{self.command} {self.path} {status}")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class HubServer(ThreadingHTTPServer):
    def __init__(self, repositories: list[Repository]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {(repository.kind, repository.name): repository for repository in repositories}
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"
