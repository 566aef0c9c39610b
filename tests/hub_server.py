"""A small Hugging Face Hub on localhost, by only the standard library: repositories, LFS, tokens, faults on demand.

It speaks what huggingface_hub needs for creating, uploading, listing and downloading; not Xet.
"""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

USER, TOKEN, READ_TOKEN = "user", "hf_PlantedTokenThatMayWrite", "hf_PlantedTokenThatMayRead"
LARGE = (".safetensors", ".bin", ".npz")


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class Hub:
    """What it stores; the id of a Space begins with spaces/.

    `fault(handler, path)` is asked before each request is answered, and may answer itself: True.
    """

    def __init__(self):
        self.repos = {}  # id -> {"commits": [(sha, {path: (bytes, is_lfs)})], "branches": {name: sha}, "private": bool}
        self.lfs, self.requests, self.lock = {}, [], threading.RLock()
        self.fault = lambda handler, path: False

    def commit(self, repo: dict, branch: str, files: dict) -> str:
        sha = sha1(repr((len(repo["commits"]), time.time(), sorted(files))).encode())
        repo["commits"].append((sha, files))
        repo["branches"][branch] = sha
        return sha

    def tree(self, repo: dict, revision: str) -> tuple:
        sha = repo["branches"].get(revision, revision)
        return next(((s, files) for s, files in repo["commits"] if s == sha), (None, None))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: data for path, (data, _) in self.tree(self.repos[repo_id], revision)[1].items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, value=None, headers: dict | None = None, raw: bytes | None = None) -> None:
        data = raw if raw is not None else json.dumps({} if value is None else value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": len(data), **(headers or {})}.items():
            self.send_header(name, str(text))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.fault(self, path):
            return
        body = self.read_body()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        stored = re.fullmatch(r"/lfs/([0-9a-f]{64})", path)  # at an address that is itself the permission
        if self.command in ("POST", "PUT", "DELETE") and not stored and token != TOKEN:
            status = 403 if token == READ_TOKEN else 401
            return self.refuse(status, "", "Invalid username or password." if status == 401 else "Forbidden")
        if stored:
            if hashlib.sha256(body).hexdigest() != stored[1]:
                return self.answer(400, {"error": "these bytes are others"})
            self.hub.lfs[stored[1]] = body
            return self.answer(200)
        if path == "/api/whoami-v2":
            return self.answer(200, {"type": "user", "name": USER, "orgs": []})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        for pattern, part in (
            (r"/((?:spaces/)?[^/]+/[^/]+)\.git/info/lfs/objects/batch", self.lfs_batch),
            (r"/api/(?:models/|(?=spaces/))((?:spaces/)?[^/]+/[^/]+)/?(.*)", self.api),
            (r"/((?:spaces/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ):
            if match := re.fullmatch(pattern, path):
                repo = self.hub.repos.get(match[1])
                if repo is None or repo["private"] and token not in (TOKEN, READ_TOKEN):
                    return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
                with self.hub.lock:
                    return part(repo, body, *match.groups())
        self.answer(404, {"error": f"no route {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    def create(self, wish: dict) -> None:
        kind = "spaces/" if wish.get("type") == "space" else ""
        repo_id = f"{kind}{wish.get('organization') or USER}/{wish['name']}"
        address = {"url": f"{self.base()}/{repo_id}", "name": repo_id, "id": repo_id}
        hidden = wish.get("private") or wish.get("visibility") == "private"
        if repo_id in self.hub.repos:
            return self.answer(409, {"error": "exists", **address}, {"X-Error-Message": "You already created this"})
        repo = self.hub.repos[repo_id] = {"commits": [], "branches": {}, "private": hidden}
        self.hub.commit(repo, "main", {".gitattributes": (b"*.safetensors filter=lfs\n", False)})
        self.answer(200, address)

    def lfs_batch(self, repo: dict, body: bytes, repo_id: str) -> None:
        objects = []
        for wish in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.base()}/lfs/{wish['oid']}", "header": {}}}
            there = wish["oid"] in self.hub.lfs
            objects.append({"oid": wish["oid"], "size": wish["size"], **({} if there else {"actions": upload})})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def api(self, repo: dict, body: bytes, repo_id: str, rest: str) -> None:
        kind, _, revision = rest.partition("/")
        if kind == "preupload":
            modes = [(f["path"], "lfs" if f["path"].endswith(LARGE) else "regular") for f in json.loads(body)["files"]]
            return self.answer(200, {"files": [
                {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None} for path, mode in modes
            ]})  # fmt: skip
        if kind == "commit":
            files = dict(self.hub.tree(repo, revision)[1] or {})
            for line in body.splitlines():
                change = json.loads(line)
                value = change["value"]
                if change["key"] == "file":
                    files[value["path"]] = (base64.b64decode(value["content"]), False)
                elif change["key"] == "lfsFile":
                    files[value["path"]] = (self.hub.lfs[value["oid"]], True)
                elif change["key"] == "deletedFile":
                    files.pop(value["path"], None)
            sha = self.hub.commit(repo, revision, files)
            address = f"{self.base()}/{repo_id}/commit/{sha}"
            return self.answer(200, {"success": True, "commitOid": sha, "commitUrl": address, "hookOutput": ""})
        if kind == "branch":
            repo["branches"].setdefault(revision, repo["branches"]["main"])
            return self.answer(201)
        if kind in ("tree", "paths-info"):
            revision, _, under = revision.partition("/")
            sha, files = self.hub.tree(repo, revision)
            if files is None:
                return self.refuse(404, "RevisionNotFound", "Revision not found")
            wanted = parse_qs(body.decode()).get("paths") if body[:1] != b"{" else json.loads(body)["paths"]
            found = []
            for path, (data, is_lfs) in sorted(files.items()):
                if (kind == "tree" or path in (wanted or ())) and path.startswith(under and f"{under}/"):
                    entry = {"type": "file", "oid": sha1(data), "size": len(data), "path": path}
                    if is_lfs:
                        oid = hashlib.sha256(data).hexdigest()
                        entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 134}
                    found.append(entry)
            return self.answer(200, found)
        if kind in ("", "revision"):
            sha, files = self.hub.tree(repo, revision or "main")
            if files is None:
                return self.refuse(404, "RevisionNotFound", f"Revision {revision} not found")
            fields = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": sha, "private": repo["private"]}
            fields |= {
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in sorted(files)],
            }
            times = dict.fromkeys(("createdAt", "lastModified"), "2026-01-01T00:00:00.000Z")
            return self.answer(200, {**fields, **times})
        self.answer(404, {"error": f"no route for {rest}"})

    def resolve(self, repo: dict, body: bytes, repo_id: str, revision: str, path: str) -> None:
        sha, files = self.hub.tree(repo, revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound", "Revision not found")
        if path not in files:
            codes = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": sha}
            return self.answer(404, {"error": "Entry not found"}, codes)
        data, is_lfs = files[path]
        tag = hashlib.sha256(data).hexdigest() if is_lfs else sha1(data)
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": sha, "Content-Type": "application/octet-stream"}
        if is_lfs:
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{tag}"'}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(part[1]), int(part[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.answer(206, raw=data[first : last + 1], headers=headers)
        self.answer(200, raw=data, headers=headers)


def serve() -> tuple[ThreadingHTTPServer, Hub, str]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, hub, f"http://127.0.0.1:{server.server_address[1]}"
