#!/usr/bin/env python3
"""A Hugging Face Hub on loopback, for tests that must use the real client code.

It serves repositories from folders and accepts pushes, speaking the part of the
Hub's HTTP API that `huggingface_hub`, `transformers` and `datasets` use:

    python local_hub.py --root STORE --port 8123 &
    export HF_ENDPOINT=http://127.0.0.1:8123 HF_TOKEN=hf_local HF_HUB_DISABLE_XET=1

STORE holds `models/<owner>/<name>/...` and `datasets/<owner>/<name>/...` (a name
without an owner is fine too).  Each push adds a commit to a branch; `resolve/<sha>` keeps
serving what that commit held.  Standard library only; binds 127.0.0.1 only.

In a test:  `with LocalHub(root) as hub: os.environ["HF_ENDPOINT"] = hub.url`; `hub.faults` cuts uploads in their
middle, `hub.received` holds every body that was sent to be stored.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

KINDS = ("models", "datasets", "spaces")
TOKEN = "hf_local"
LFS_THRESHOLD = 1 << 20  # bytes; larger or binary files go through LFS
BINARY = (".safetensors", ".bin", ".png", ".parquet", ".pt", ".gguf")


def is_lfs(name: str, size: int) -> bool:
    return size > LFS_THRESHOLD or name.endswith(BINARY)


def git_blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Store:
    """Repositories as folders, their commits as snapshots next to them.

    `main` is the folder itself, another branch a folder under `.branches`; a branch's log holds its commits.
    """

    def __init__(self, root: Path):
        self.root = Path(root)
        self.lfs = self.root / ".lfs"
        self.lfs.mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()
        self.logs: dict[tuple[str, str], dict[str, list[tuple[str, Path]]]] = {}
        self.private: set[tuple[str, str]] = set()

    def folder(self, kind: str, repo: str) -> Path:
        path = (self.root / kind / repo).resolve()
        if self.root.resolve() not in path.parents:
            raise PermissionError(repo)
        return path

    def exists(self, kind: str, repo: str) -> bool:
        return self.folder(kind, repo).is_dir()

    def files(self, kind: str, repo: str, rev: str = "main") -> dict[str, Path]:
        base = self.snapshot(kind, repo, rev)
        return {p.relative_to(base).as_posix(): p for p in sorted(base.rglob("*")) if p.is_file()}

    def branches(self, kind: str, repo: str) -> list[str]:
        return sorted({"main", *self.logs.get((kind, repo), {})})

    def log(self, kind: str, repo: str, branch: str) -> list[tuple[str, Path]]:
        return self.logs.setdefault((kind, repo), {}).setdefault(branch, [])

    def head(self, kind: str, repo: str, branch: str = "main") -> str:
        log = self.logs.get((kind, repo), {}).get(branch)
        if log:
            return log[-1][0]
        digest = hashlib.sha1()
        for name, path in self.files_of(self.folder(kind, repo)):
            digest.update(name.encode() + path.read_bytes())
        return digest.hexdigest()

    def sha_of(self, kind: str, repo: str, rev: str) -> str:
        rev = "main" if rev == "HEAD" else rev
        return self.head(kind, repo, rev) if rev in self.branches(kind, repo) else rev

    def create_branch(self, kind: str, repo: str, branch: str, start: str) -> None:
        log, source = self.log(kind, repo, branch), self.snapshot(kind, repo, start)
        shutil.copytree(source, self.working_folder(kind, repo, branch))
        log.append((self.sha_of(kind, repo, start), source))

    def working_folder(self, kind: str, repo: str, branch: str) -> Path:
        return self.folder(kind, repo) if branch == "main" else self.root / ".branches" / kind / repo / branch

    @staticmethod
    def files_of(base: Path):
        return [(p.relative_to(base).as_posix(), p) for p in sorted(base.rglob("*")) if p.is_file()]

    def snapshot(self, kind: str, repo: str, rev: str) -> Path:
        for log in self.logs.get((kind, repo), {}).values():
            for sha, path in log:
                if sha == rev:
                    return path
        rev = "main" if rev == "HEAD" else rev
        if rev in self.branches(kind, repo):
            return self.working_folder(kind, repo, rev)
        if rev == self.head(kind, repo):
            return self.folder(kind, repo)
        raise KeyError(rev)

    def commit(self, kind: str, repo: str, operations: list[dict], branch: str = "main") -> str:
        with self.lock:
            if branch not in self.branches(kind, repo):
                raise KeyError(branch)
            base = self.working_folder(kind, repo, branch)
            for op in operations:
                key, value = op["key"], op["value"]
                if key == "header":
                    continue
                target = (base / value["path"]).resolve()
                if base.resolve() not in target.parents and target != base.resolve():
                    raise PermissionError(value["path"])
                if key == "file":
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(value["content"]))
                elif key == "lfsFile":
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(self.lfs / value["oid"], target)
                elif key == "deletedFile":
                    target.unlink(missing_ok=True)
                elif key == "deletedFolder":
                    shutil.rmtree(target, ignore_errors=True)
            log = self.log(kind, repo, branch)
            digest = hashlib.sha1(f"{branch} {len(log)}".encode())
            for name, path in self.files_of(base):
                digest.update(name.encode() + path.read_bytes())
            sha = digest.hexdigest()
            copy = self.root / ".commits" / kind / repo / sha
            if not copy.exists():
                shutil.copytree(base, copy)
            log.append((sha, copy))
            return sha


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store
    requests: list[str]
    received: list[bytes]
    faults: dict[str, int]

    def log_message(self, *args):  # quiet
        pass

    # --- answers -----------------------------------------------------------
    def reply(self, status: int, body: bytes = b"", headers: dict | None = None, length: int | None = None):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value, status: int = 200, headers: dict | None = None):
        self.reply(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def missing(self, code: str, message: str, status: int = 404):
        self.json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def authorized(self) -> bool:
        return self.headers.get("Authorization", "") == f"Bearer {TOKEN}"

    def file_entry(self, name: str, path: Path) -> dict:
        data = path.read_bytes()
        entry = {"type": "file", "path": name, "size": len(data), "oid": git_blob_id(data)}
        if is_lfs(name, len(data)):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    # --- routing -----------------------------------------------------------
    def handle_any(self):
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.requests.append(f"{self.command} {path}")
        routes = (
            (r"/api/whoami-v2", self.whoami),
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", lambda q: (self.body(), self.json({"errors": [], "warnings": []}))),
            (r"/api/(models|datasets|spaces)/(.+?)/preupload/([^/]+)", self.preupload),
            (r"/api/(models|datasets|spaces)/(.+?)/commit/([^/]+)", self.commit),
            (r"/api/(models|datasets|spaces)/(.+?)/commits/([^/]+)", self.commits),
            (r"/api/(models|datasets|spaces)/(.+?)/branch/([^/]+)", self.branch),
            (r"/api/(models|datasets|spaces)/(.+?)/tree/([^/]+)(?:/(.*))?", self.tree),
            (r"/api/(models|datasets|spaces)/(.+?)/paths-info/([^/]+)", self.paths_info),
            (r"/api/(models|datasets|spaces)/(.+?)/revision/([^/]+)", self.info),
            (r"/api/(models|datasets|spaces)/(.+?)/refs", self.refs),
            (r"/api/(models|datasets|spaces)/((?:[^/]+/)?[^/]+)", self.info),
            (r"/(?:(datasets|spaces)/)?(.+?)\.git/info/lfs/objects/batch", self.lfs_batch),
            (r"/lfs/([0-9a-f]{64})", self.lfs_object),
            (r"/(?:(datasets|spaces)/)?((?:[^/]+/)?[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        )
        try:
            for pattern, handler in routes:
                match = re.fullmatch(pattern, path)
                if match:
                    return handler(query, *match.groups())
            self.body()
            self.missing("NotFound", f"no route for {path}")
        except KeyError:
            self.missing("RevisionNotFound", "Invalid rev id")
        except PermissionError:
            self.missing("BadRequest", "path outside the repository", 400)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def whoami(self, query):
        if not self.authorized():
            return self.json({"error": "Invalid credentials in Authorization header"}, 401)
        self.json(
            {
                "type": "user",
                "name": "local",
                "fullname": "Local",
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": {"displayName": "local", "role": "write"}},
            }
        )

    def create(self, query):
        body = json.loads(self.body() or b"{}")
        if not self.authorized():
            return self.json({"error": "Invalid username or password."}, 401)
        kind = {"model": "models", "dataset": "datasets", "space": "spaces"}[body.get("type") or "model"]
        owner = body.get("organization") or "local"
        repo = body["name"] if "/" in body["name"] else f"{owner}/{body['name']}"
        if self.store.exists(kind, repo):
            return self.json({"error": "You already created this model repo", "url": self.url_of(kind, repo)}, 409)
        self.store.folder(kind, repo).mkdir(parents=True)
        if body.get("private") or body.get("visibility") == "private":
            self.store.private.add((kind, repo))
        (self.store.folder(kind, repo) / ".gitattributes").write_text(
            "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        )
        self.store.commit(kind, repo, [])
        self.json({"url": self.url_of(kind, repo), "name": repo, "id": repo})

    def url_of(self, kind: str, repo: str) -> str:
        host = f"http://{self.headers['Host']}"
        return f"{host}/{repo}" if kind == "models" else f"{host}/{kind}/{repo}"

    def known(self, kind: str, repo: str) -> bool:
        if self.store.exists(kind, repo):
            return True
        self.body()
        self.missing("RepoNotFound", "Repository not found", 404 if self.authorized() else 401)
        return False

    def info(self, query, kind, repo, rev="main"):
        if not self.known(kind, repo):
            return
        files = self.store.files(kind, repo, rev)
        sha = self.store.sha_of(kind, repo, rev)
        self.json(
            {
                "_id": "0",
                "id": repo,
                "modelId": repo,
                "sha": sha,
                "private": (kind, repo) in self.store.private,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "author": repo.split("/")[0],
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": name} for name in files],
            }
        )

    def refs(self, query, kind, repo):
        if self.known(kind, repo):
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": self.store.head(kind, repo, name)}
                for name in self.store.branches(kind, repo)
            ]
            self.json({"branches": branches, "converts": [], "tags": []})

    def commits(self, query, kind, repo, rev):
        if self.known(kind, repo):
            more = {"authors": [{"user": "local"}], "date": "2026-01-01T00:00:00.000Z", "title": "", "message": ""}
            self.json([{"id": sha} | more for sha, _ in reversed(self.store.log(kind, repo, rev))])

    def branch(self, query, kind, repo, name):
        body = json.loads(self.body() or b"{}")
        if not self.authorized():
            return self.json({"error": "Invalid username or password."}, 401)
        if not self.known(kind, repo):
            return
        if name in self.store.branches(kind, repo):
            return self.json({"error": "Reference already exists"}, 409)
        self.store.create_branch(kind, repo, name, body.get("startingPoint", "main"))
        self.json({})

    def tree(self, query, kind, repo, rev, under=None):
        if not self.known(kind, repo):
            return
        under = (under or "").strip("/")
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for name, path in self.store.files(kind, repo, rev).items():
            if under and not name.startswith(under + "/"):
                continue
            rest = name[len(under) + 1 if under else 0 :]
            parts = rest.split("/")
            depth = len(parts) - 1 if recursive else min(1, len(parts) - 1)
            for i in range(1, depth + 1):
                folders.add("/".join(filter(None, [under, *parts[:i]])))
            if recursive or len(parts) == 1:
                entries.append(self.file_entry(name, path))
        if under and not entries and not folders:
            return self.missing("EntryNotFound", f"{under} does not exist")
        entries += [
            {"type": "directory", "path": f, "size": 0, "oid": hashlib.sha1(f.encode()).hexdigest()}
            for f in sorted(folders)
        ]
        self.json(entries)

    def paths_info(self, query, kind, repo, rev):
        raw = self.body()
        if not self.known(kind, repo):
            return
        if self.headers.get("Content-Type", "").startswith("application/json"):
            wanted = json.loads(raw)["paths"]
        else:
            wanted = parse_qs(raw.decode()).get("paths", [])
        files = self.store.files(kind, repo, rev)
        answer = []
        for name in [wanted] if isinstance(wanted, str) else wanted:
            name = name.rstrip("/")
            if name in files:
                answer.append(self.file_entry(name, files[name]))
            elif any(f.startswith(name + "/") for f in files):
                answer.append({"type": "directory", "path": name, "size": 0, "oid": "0" * 40})
        self.json(answer)

    def resolve(self, query, kind, repo, rev, name):
        kind = kind or "models"
        if not self.known(kind, repo):
            return
        files = self.store.files(kind, repo, rev)
        sha = self.store.sha_of(kind, repo, rev)
        if name not in files:
            return self.json(
                {"error": "Entry not found"},
                404,
                {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": sha},
            )
        data = files[name].read_bytes()
        entry = self.file_entry(name, files[name])
        headers = {
            "X-Repo-Commit": sha,
            "ETag": f'"{entry.get("lfs", entry)["oid"]}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span:
            start, end = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self.reply(206, data[start : end + 1], headers)
        self.reply(200, data, headers, len(data))

    # --- pushing -----------------------------------------------------------
    def preupload(self, query, kind, repo, rev):
        body = json.loads(self.body())
        if not self.authorized():
            return self.json({"error": "Invalid username or password."}, 401)
        if not self.known(kind, repo):
            return
        there = self.store.files(kind, repo, rev)
        answer = []
        for file in body["files"]:
            name, lfs = file["path"], is_lfs(file["path"], file["size"])
            entry = self.file_entry(name, there[name]) if name in there else {}
            oid = entry.get("lfs", entry).get("oid")
            answer.append({"path": name, "shouldIgnore": False, "uploadMode": "lfs" if lfs else "regular", "oid": oid})
        self.json({"files": answer})

    def lfs_batch(self, query, kind, repo):
        body = json.loads(self.body())
        if not self.authorized():
            return self.json({"error": "Invalid username or password."}, 401)
        objects = []
        for obj in body["objects"]:
            entry = {"oid": obj["oid"], "size": obj["size"]}
            if not (self.store.lfs / obj["oid"]).exists():
                entry["actions"] = {"upload": {"href": f"http://{self.headers['Host']}/lfs/{obj['oid']}", "header": {}}}
            objects.append(entry)
        self.json({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_object(self, query, oid):
        if self.faults.get("pass", 0) > 0:
            self.faults["pass"] -= 1
        elif self.faults.get("cuts", 0) > 0:
            self.faults["cuts"] -= 1
            self.rfile.read(min(self.faults.get("after", 0), int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        data = self.body()
        self.received.append(data)
        if hashlib.sha256(data).hexdigest() != oid:
            return self.json({"error": "checksum mismatch"}, 422)
        (self.store.lfs / oid).write_bytes(data)
        self.reply(200)

    def commit(self, query, kind, repo, rev):
        body = self.body()
        self.received.append(body)
        operations = [json.loads(line) for line in body.splitlines() if line.strip()]
        if not self.authorized():
            return self.json({"error": "Invalid username or password."}, 401)
        if not self.known(kind, repo):
            return
        sha = self.store.commit(kind, repo, operations, rev)
        self.json(
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{self.url_of(kind, repo)}/commit/{sha}",
                "hookOutput": "",
            }
        )


class LocalHub:
    """The server as a context manager; the attributes are for the test.

    `.url`, `.token`; `.requests`: method and path of each; `.received`: bodies of uploads and commits;
    `.faults`: {"pass": P, "cuts": N, "after": B} lets P uploads of a file pass and cuts the next N after B bytes.
    """

    def __init__(self, root: str | Path, port: int = 0):
        self.token, self.requests, self.received, self.faults = TOKEN, [], [], {}
        shared = {"requests": self.requests, "received": self.received, "faults": self.faults}
        handler = type("BoundHandler", (Handler,), {"store": Store(Path(root))} | shared)
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder with models/ and datasets/")
    parser.add_argument("--port", type=int, default=8123)
    args = parser.parse_args()
    hub = LocalHub(args.root, args.port)
    print(f"HF_ENDPOINT={hub.url} HF_TOKEN={hub.token} HF_HUB_DISABLE_XET=1", flush=True)
    hub.server.serve_forever()


if __name__ == "__main__":
    main()
