"""A small server on loopback that speaks the part of the Hub's API that downloads and publishing use.

It serves folders as repositories, each at one commit, also reachable as `main`. huggingface_hub and datasets find it
through the environment variable HF_ENDPOINT; they themselves are not changed. Who has a token of the server's that may
write can make repositories and commit to them. Where HF_HUB_DISABLE_XET is set, large files come by LFS; else by Xet,
into a folder that the server does not read: it must have them by LFS before.
"""

import base64
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
    private: bool = False

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

    def upload_mode(self, name: str) -> dict:
        """How a file is to be uploaded, and the hash of what the repository has under its name."""
        mode, oid = "lfs" if name.endswith(".safetensors") else "regular", None
        if (self.folder / name).is_file():
            content = (self.folder / name).read_bytes()
            blob = b"blob %d\0" % len(content) + content
            oid = hashlib.sha256(content).hexdigest() if mode == "lfs" else hashlib.sha1(blob).hexdigest()
        return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if "/xet-write-token/" not in self.path:
            self.answer()
        elif self.role() == "write":
            self.send({"casUrl": f"local://{self.server.published}/.xet", "exp": 2**32, "accessToken": "none"})
        else:
            self.fail("", 403)

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        body = [json.loads(line) for line in self.body().splitlines()]
        if "/paths-info/" in self.path:
            self.answer(body[0])
        else:
            self.write(body)

    def do_PUT(self) -> None:
        """A large file, at the address that the LFS batch gave for it."""
        self.server.large_files[self.path.rpartition("/")[2]] = self.body()
        self.send({})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def role(self) -> str | None:
        return self.server.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def write(self, body: list[dict]) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            licence = re.search(r"^license: (.*)$", body[0]["content"], re.MULTILINE)
            known = bool(licence) and licence[1] in ("apache-2.0", "mit", "cc-by-4.0")
            errors = [] if known else [{"message": '"license" must be one of a list'}]
            return self.send({"errors": errors, "warnings": []}, 400 if errors else 200)
        if self.role() != "write":
            return self.fail("", 403) if self.role() else self.fail("", 401)
        if path == "/api/repos/create":
            return self.create(f"{body[0]['organization']}/{body[0]['name']}", body[0].get("visibility") == "private")
        call = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git/info/lfs/objects|/preupload|/commit)/(\w+)", path)
        repository = self.server.repositories.get(("models", call[1])) if call else None
        if repository is None:
            return self.fail("RepoNotFound", 401)
        if "/preupload/" in path:
            return self.send({"files": [repository.upload_mode(file["path"]) for file in body[0]["files"]]})
        if call[2] == "batch":
            return self.send({"objects": [self.large_file(**one) for one in body[0]["objects"]]})
        if call[2] == "verify":
            content = self.server.large_files.get(body[0]["oid"], b"")
            whole = (hashlib.sha256(content).hexdigest(), len(content)) == (body[0]["oid"], body[0]["size"])
            return self.send({}) if whole else self.fail("", 422)
        return self.commit(repository, body)

    def create(self, name: str, private: bool) -> None:
        url = {"url": f"{self.server.url}/{name}"}
        if ("models", name) in self.server.repositories:
            return self.send(url, 409)
        folder = self.server.published / name
        folder.mkdir(parents=True)
        self.server.repositories["models", name] = Repository("models", name, "0" * 40, folder, private)
        return self.send(url)

    def large_file(self, oid: str, size: int) -> dict:
        """What a client is to do with it, as an LFS batch says: nothing where the server has it."""
        name = re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", self.path)[1]
        upload = {"href": f"{self.server.url}/large-files/{oid}"}
        verify = {"href": f"{self.server.url}/{name}.git/info/lfs/objects/verify"}
        there = oid in self.server.large_files
        return {"oid": oid, "size": size} | ({} if there else {"actions": {"upload": upload, "verify": verify}})

    def commit(self, repository: Repository, lines: list[dict]) -> None:
        for line in lines[1:]:
            value, large = line["value"], line["key"] == "lfsFile"
            content = self.server.large_files[value["oid"]] if large else base64.b64decode(value["content"])
            path = repository.folder / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        commit = hashlib.sha1(repository.commit.encode() + json.dumps(lines).encode()).hexdigest()
        self.server.repositories["models", repository.name] = repository._replace(commit=commit)
        self.send({"commitUrl": f"{self.server.url}/{repository.name}/commit/{commit}", "commitOid": commit})

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
        if repository is None or (repository.private and not self.role()):
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
        return self.send(
            {"id": name, "sha": repository.commit, "siblings": siblings, "private": repository.private, "tags": []}
        )

    def send_file(self, repository: Repository, file: str) -> None:
        path = repository.folder / file
        if not path.is_file():
            return self.fail("EntryNotFound", commit=repository.commit)
        content = path.read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        return self.send_bytes(content, {"ETag": f'"{etag}"', COMMIT: repository.commit})

    def send(self, value: object, status: int = 200) -> None:
        self.send_bytes(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

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
    def __init__(
        self, repositories: list[Repository], published: Path | None = None, tokens: dict[str, str] | None = None
    ) -> None:
        """`published` is the folder for new repositories; `tokens` maps a token to its role, "read" or "write"."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {(repository.kind, repository.name): repository for repository in repositories}
        self.published, self.tokens = published, tokens or {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"
