"""
A Hugging Face Hub on the loopback interface, for tests.

It speaks as much of the Hub's protocol as huggingface_hub's own client needs to create model repositories, push commits
with regular and LFS files to branches, list revisions and download them, and it can be made to fail. Large files are kept by a
storage at another host name than the API, as on the Hub, so that a client that sends it an access token gives that away.
There is no Xet storage: clients need `HF_HUB_DISABLE_XET=1`.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import transformers.utils.hub
import yaml


LFS_SUFFIXES = (".safetensors", ".png", ".tfevents")


@dataclass(frozen=True)
class User:
    """Who an access token belongs to, and whether the token allows to write."""

    name: str
    may_write: bool = True


@dataclass(frozen=True)
class Commit:
    """A revision: its SHA, and its files by path."""

    sha: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """A model repository: its `main` branch, oldest commit first, and others, each with what it began from; and tags."""

    private: bool
    commits: list[Commit]
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)

    def branch(self, name: str) -> list[Commit]:
        if name == "main":
            return self.commits
        if name not in self.branches:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return self.branches[name]

    def find(self, revision: str) -> Commit:
        for commit in (*self.commits, *(commit for branch in self.branches.values() for commit in branch)):
            if commit.sha == revision:
                return commit
        return self.tags[revision] if revision in self.tags else self.branch(revision)[-1]


@dataclass(frozen=True)
class Request:
    """A request as it came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Failure:
    """What becomes of requests whose `METHOD /path` matches: they are refused, or their connection breaks off."""

    pattern: str
    status: int | None
    message: str
    after_bytes: int | None
    met: int = 0


@dataclass
class Response:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, code: str | None = None, **fields):
        super().__init__(message)
        headers = {
            "X-Error-Message": " ".join(message.split()),
            **({"X-Error-Code": code} if code else {}),
            **fields.pop("headers", {}),
        }
        self.response = Response(status, json.dumps({"error": message, **fields}).encode(), headers)


class HubServer:
    """
    A Hub that runs while its context is open.

    Args:
        users: the holders of access tokens, by token.
        part_size: files above this many bytes are uploaded in parts of this size.

    Attributes:
        url: what clients need as `HF_ENDPOINT`.
        repositories: the models, by `user/name`.
        requests: all requests so far.
    """

    #: What makes the URLs of the storage valid; it must not appear in logs.
    SIGNATURE = "X-Amz-Signature=0123456789abcdef"

    def __init__(self, users: dict[str, User], part_size: int = 200_000):
        self.users = users
        self.part_size = part_size
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[Request] = []
        self.failures: list[Failure] = []
        self._lock = threading.Lock()

    def __enter__(self):
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        port = self._server.server_address[1]
        self.url, self.storage_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}/storage"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @contextlib.contextmanager
    def reached(self, token: str | None, **constants) -> Iterator[None]:
        """
        While open, this process has access to this Hub, and to it alone.

        Args:
            constants: what else `huggingface_hub` has read from the environment when it was imported.
        """
        constants = {"ENDPOINT": self.url, "HF_HUB_DISABLE_XET": True, **constants}
        url = constants["ENDPOINT"]
        constants["HUGGINGFACE_CO_URL_TEMPLATE"] = url + "/{repo_id}/resolve/{revision}/{filename}"
        with pytest.MonkeyPatch.context() as patch:
            for name, value in constants.items():
                patch.setattr(huggingface_hub.constants, name, value)
            # Clients that are made once, with what was the address then.
            patch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
            patch.setattr(transformers.utils.hub, "_hf_api", None)
            patch.setenv("HF_TOKEN", token or "")
            yield

    @contextlib.contextmanager
    def failing(
        self, pattern: str, *, status: int | None = None, message: str = "injected", after_bytes: int | None = None
    ) -> Iterator[Failure]:
        """
        While open, requests whose `METHOD /path` matches `pattern` are answered with `status` and `message`, or their
        connection is broken after `after_bytes` bytes of their body.
        """
        failure = Failure(pattern, status, message, after_bytes)
        self.failures.append(failure)
        try:
            yield failure
        finally:
            self.failures.remove(failure)

    def failure_of(self, method: str, path: str) -> Failure | None:
        for failure in self.failures:
            if re.search(failure.pattern, f"{method} {path}"):
                failure.met += 1
                return failure
        return None

    def user_of(self, request: Request) -> User | None:
        authorization = request.headers.get("authorization")
        if authorization is None:
            return None
        user = self.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def repository(self, request: Request, repo_id: str, write: bool = False) -> Repository:
        """The repository, if the request's sender may read it, or write it."""
        user, owner = self.user_of(request), repo_id.split("/")[0]
        repository = self.repositories.get(repo_id)
        if repository is None or (repository.private and (user is None or user.name != owner)):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refusal(401, "Invalid username or password.")
        if write and not (user.may_write and user.name == owner):
            raise Refusal(403, "Forbidden: you must have write access to push to this repository")
        return repository

    def store(self, oid: str, content: bytes):
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "The content does not have the announced SHA-256")
        self.objects[oid] = content

    # The Hub's endpoints. Each takes the request and the groups of its pattern in ROUTES.

    def whoami(self, request: Request):
        user = self.user_of(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        role = "write" if user.may_write else "read"
        return {"type": "user", "name": user.name, "orgs": [], "auth": {"accessToken": {"role": role}}}

    def create_repository(self, request: Request):
        payload, user = json.loads(request.body), self.user_of(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        namespace = payload["organization"] or user.name
        repo_id = f"{namespace}/{payload['name']}"
        if namespace != user.name or not user.may_write:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        url = f"{self.url}/{repo_id}"
        if repo_id in self.repositories:
            raise Refusal(409, "You already created this model repo", url=url)
        initial = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        commit = Commit(hashlib.sha1(repo_id.encode()).hexdigest(), "initial commit", initial)
        self.repositories[repo_id] = Repository(payload.get("visibility") == "private", [commit])
        return {"url": url, "name": repo_id}

    def validate_yaml(self, request: Request):
        metadata = re.match(r"---\n(.*?)\n---", json.loads(request.body)["content"], flags=re.DOTALL)
        try:
            yaml.safe_load(metadata[1] if metadata else "")
        except yaml.YAMLError as error:
            raise Refusal(400, "Invalid YAML", errors=[{"message": str(error)}], warnings=[]) from error
        return {"errors": [], "warnings": []}

    def model_info(self, request: Request, repo_id: str, revision: str = "main"):
        repository = self.repository(request, repo_id)
        commit = repository.find(revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return {"id": repo_id, "sha": commit.sha, "private": repository.private, "tags": [], "siblings": siblings}

    def tree(self, request: Request, repo_id: str, revision: str, folder: str = ""):
        files = self.repository(request, repo_id).find(revision).files
        prefix = f"{folder}/" if folder else ""
        if not any(path.startswith(prefix) for path in files):
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        entries = []
        for path, content in files.items():
            if path.startswith(prefix):
                entry = {"type": "file", "path": path, "size": len(content), "oid": _etag("x", content)}
                if path.endswith(LFS_SUFFIXES):
                    entry["lfs"] = {"oid": _etag(path, content), "size": len(content), "pointerSize": 130}
                entries.append(entry)
        return entries

    def auth_check(self, request: Request, repo_id: str, write: str | None):
        self.repository(request, repo_id, write=write is not None)
        return {}

    def refs(self, request: Request, repo_id: str):
        repository = self.repository(request, repo_id)
        heads = {"main": repository.commits, **repository.branches}
        return {
            "branches": [_ref("heads", name, commits[-1]) for name, commits in heads.items()],
            "tags": [_ref("tags", name, commit) for name, commit in repository.tags.items()],
            "converts": [],
        }

    def create_branch(self, request: Request, repo_id: str, name: str):
        repository = self.repository(request, repo_id, write=True)
        if name == "main" or name in repository.branches:
            raise Refusal(409, "Reference already exists")
        if not re.fullmatch(r"[\w./-]+", name):
            raise Refusal(400, f"Invalid reference name: {name}")
        repository.branches[name] = list(repository.commits)
        return {}

    def preupload(self, request: Request, repo_id: str, revision: str):
        files = self.repository(request, repo_id, write=True).find(revision).files
        return {
            "files": [
                {
                    "path": path,
                    "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": _etag(path, files[path]) if path in files else None,
                }
                for path in (file["path"] for file in json.loads(request.body)["files"])
            ]
        }

    def lfs_batch(self, request: Request, repo_id: str):
        repository = self.repository(request, repo_id, write=True)
        commits = [*repository.commits, *(commit for branch in repository.branches.values() for commit in branch)]
        present = {_etag(path, content) for commit in commits for path, content in commit.files.items()}
        objects = []
        for entry in json.loads(request.body)["objects"]:
            oid, size = entry["oid"], entry["size"]
            if oid not in present:
                upload = {"href": f"{self.storage_url}/{oid}?{self.SIGNATURE}"}
                if size > self.part_size:
                    numbers = range(1, -(-size // self.part_size) + 1)
                    parts = {str(n): f"{self.storage_url}/{oid}/{n}?{self.SIGNATURE}" for n in numbers}
                    upload = {
                        "href": f"{self.storage_url}/{oid}/complete?{self.SIGNATURE}",
                        "header": {"chunk_size": str(self.part_size), **parts},
                    }
                verify = {"href": f"{self.url}/{repo_id}.git/info/lfs/objects/verify"}
                entry = {**entry, "actions": {"upload": upload, "verify": verify}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def lfs_verify(self, request: Request, repo_id: str):
        self.repository(request, repo_id, write=True)
        entry = json.loads(request.body)
        if len(self.objects.get(entry["oid"], b"")) != entry["size"]:
            raise Refusal(404, "The object was not uploaded")
        return {}

    def storage_put(self, request: Request, oid: str):
        self._check_signature(request)
        self.store(oid, request.body)
        return {}

    def storage_put_part(self, request: Request, oid: str, number: str):
        self._check_signature(request)
        self.parts[oid, int(number)] = request.body
        return Response(headers={"ETag": hashlib.md5(request.body).hexdigest()})

    def storage_complete(self, request: Request, oid: str):
        self._check_signature(request)
        numbers = [part["partNumber"] for part in json.loads(request.body)["parts"]]
        self.store(oid, b"".join(self.parts.pop((oid, number)) for number in numbers))
        return {}

    def storage_get(self, request: Request, oid: str):
        self._check_signature(request)
        return Response(body=self.objects[oid])

    def _check_signature(self, request: Request):
        if urlsplit(request.path).query != self.SIGNATURE:
            raise Refusal(403, "SignatureDoesNotMatch")

    def commit(self, request: Request, repo_id: str, revision: str):
        repository = self.repository(request, repo_id, write=True)
        commits = repository.branch(revision)
        files = dict(commits[-1].files)
        message = ""
        for line in request.body.splitlines():
            key, value = (operation := json.loads(line))["key"], operation["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refusal(400, f"The LFS object of {value['path']} was not uploaded")
                files[value["path"]] = self.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"Unknown operation {key}")
        sha = hashlib.sha1(commits[-1].sha.encode() + request.body).hexdigest()
        commits.append(Commit(sha, message, files))
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo_id}/commit/{sha}"}

    def resolve(self, request: Request, repo_id: str, revision: str, path: str):
        commit = self.repository(request, repo_id).find(revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers=headers)
        content, etag = commit.files[path], f'"{_etag(path, commit.files[path])}"'
        if path.endswith(LFS_SUFFIXES):
            location = f"{self.storage_url}/{_etag(path, content)}?{self.SIGNATURE}"
            linked = {"X-Linked-ETag": etag, "X-Linked-Size": str(len(content)), "Location": location}
            return Response(302, headers={**headers, **linked})
        return Response(body=content, headers={**headers, "ETag": etag})


REPOSITORY = r"([\w.-]+/[\w.-]+)"

ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", r"/api/whoami-v2", HubServer.whoami),
    ("POST", r"/api/repos/create", HubServer.create_repository),
    ("POST", r"/api/validate-yaml", HubServer.validate_yaml),
    ("GET", rf"/api/models/{REPOSITORY}", HubServer.model_info),
    ("GET", rf"/api/models/{REPOSITORY}/revision/([^/]+)", HubServer.model_info),
    ("GET", rf"/api/models/{REPOSITORY}/auth-check(/write)?", HubServer.auth_check),
    ("GET", rf"/api/models/{REPOSITORY}/refs", HubServer.refs),
    ("POST", rf"/api/models/{REPOSITORY}/branch/([^/]+)", HubServer.create_branch),
    ("GET", rf"/api/models/{REPOSITORY}/tree/([^/]+)", HubServer.tree),
    ("GET", rf"/api/models/{REPOSITORY}/tree/([^/]+)/(.+)", HubServer.tree),
    ("POST", rf"/api/models/{REPOSITORY}/preupload/([^/]+)", HubServer.preupload),
    ("POST", rf"/api/models/{REPOSITORY}/commit/([^/]+)", HubServer.commit),
    ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", HubServer.lfs_batch),
    ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/verify", HubServer.lfs_verify),
    ("PUT", r"/storage/(\w+)", HubServer.storage_put),
    ("PUT", r"/storage/(\w+)/(\d+)", HubServer.storage_put_part),
    ("POST", r"/storage/(\w+)/complete", HubServer.storage_complete),
    ("GET", r"/storage/(\w+)", HubServer.storage_get),
    ("GET", rf"/{REPOSITORY}/resolve/([^/]+)/(.+)", HubServer.resolve),
]


def _ref(kind: str, name: str, commit: Commit) -> dict:
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit.sha}


def _etag(path: str, content: bytes) -> str:
    """The name that the Hub has for a file's content: git's, or the SHA-256 of a file in LFS."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        # Clients that end between two requests are none of a test's failures.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Reads requests, fails where it should, and leaves the rest to the routes."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def dispatch(self):
        failure = self.hub.failure_of(self.command, self.path)
        if failure is not None and failure.after_bytes is not None:
            self.rfile.read(min(failure.after_bytes, int(self.headers.get("Content-Length", 0))))
            # Reset the connection, rather than end it in good order.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body)
        with self.hub._lock:
            self.hub.requests.append(request)
            try:
                if failure is not None:
                    raise Refusal(failure.status, failure.message)
                answer = self.answer(request)
            except Refusal as refusal:
                answer = refusal.response
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def answer(self, request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        path = urlsplit(request.path).path
        for route_method, pattern, endpoint in ROUTES:
            if route_method == method and (match := re.fullmatch(pattern, path)):
                # (The name of a branch may hold a slash, which is quoted.)
                answer = endpoint(self.hub, request, *(group and unquote(group) for group in match.groups()))
                return answer if isinstance(answer, Response) else Response(body=json.dumps(answer).encode())
        raise Refusal(404, f"No such endpoint: {request.method} {path}")

    def log_message(self, *arguments):
        pass
