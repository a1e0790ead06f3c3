"""A small Hugging Face hub on loopback: the few endpoints that huggingface_hub uses to list and fetch a model."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Serves folders as repositories; `requests` logs "METHOD path status"."""

    repos: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    token: str = "hf_right"
    url: str = ""
    requests: list[str] = field(default_factory=list)

    def fetched(self) -> set[str]:
        """Names of the files whose content was sent."""
        return {
            line.split()[1].rpartition("/")[2]
            for line in self.requests
            if line.startswith("GET") and "/resolve/" in line and line.endswith(" 200")
        }


@contextmanager
def running_hub(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            is_api = path.startswith("/api/models/")
            parts = path.removeprefix("/api/models/").strip("/").split("/")
            repo = "/".join(parts[:2])
            if repo not in hub.repos:
                self._send(404 if self._authorised() else 401, b"", {"X-Error-Code": "RepoNotFound"}, body)
            elif repo in hub.gated and not is_api and not self._authorised():
                self._send(401, b"", {"X-Error-Code": "GatedRepo"}, body)
            elif is_api and parts[2:3] == ["revision"] and parts[3] not in ("main", COMMIT):
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
            elif is_api:
                self._send(
                    200, json.dumps(self._info(repo)).encode(), {"Content-Type": "application/json"}, body
                )
            else:
                self._file(hub.repos[repo] / "/".join(parts[4:]), body)

        def _authorised(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {hub.token}"

        def _info(self, repo: str) -> dict[str, object]:
            siblings = []
            for path in sorted(hub.repos[repo].iterdir()):
                data = path.read_bytes()
                entry: dict[str, object] = {"rfilename": path.name, "size": len(data)}
                entry["blobId"] = hashlib.sha1(data).hexdigest()
                if path.suffix == ".safetensors":
                    entry["lfs"] = {
                        "sha256": hashlib.sha256(data).hexdigest(),
                        "size": len(data),
                        "pointerSize": 1,
                    }
                siblings.append(entry)
            return {
                "id": repo,
                "modelId": repo,
                "sha": COMMIT,
                "siblings": siblings,
                "tags": [],
                "private": False,
            }

        def _file(self, path: Path, body: bool) -> None:
            if not path.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
                return
            data = path.read_bytes()
            tag = hashlib.sha256(data).hexdigest()
            self._send(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'}, body)

        def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
            hub.requests.append(f"{self.command} {self.path} {status}")
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            """Quiet: `requests` is the log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
