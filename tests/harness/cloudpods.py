"""A stand-in for the cloud's pods: what they would tell of their devices, for the operator to ask and to give policies.

kwok's pods have addresses that lead nowhere, so the operator is told by HAT_OPERATOR_DEVICES_URL to ask here.
"""

from __future__ import annotations

import json
import random
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from hat_runtime.cloud.documents import OlderDocument
from hat_runtime.cloud.policy import PolicyStore
from hat_runtime.control.published import PolicyError

JITTER = 0.05
"""Every answer differs from the one before by up to this part: real figures never stand still."""


class CloudPods:
    """Serves GET /NAMESPACE/POD/v1/devices and .../v1/policy as hat_runtime/cloud/admin.py does, and takes PUT."""

    def __init__(self, devices: Mapping[str, Sequence[str]], *, tuning: bool = False) -> None:
        """`devices` are the names of the devices of each HatDeployment.

        With `tuning` the pods also say what chunk sizes depend on; without, there is no ground for a policy.
        """
        self._devices = devices
        self._tuning = tuning
        self.policies: dict[str, PolicyStore] = defaultdict(PolicyStore)
        """What each pod has taken."""
        self.quiet: set[str] = set()
        """Devices that were heard two minutes ago."""
        self.silent = False
        """Whether pods answer with status 503."""
        self._random = random.Random(4)
        self._lock = threading.Lock()
        self._uplinks = {
            name: 1e6 * (1 + i % 7) for names in devices.values() for i, name in enumerate(names)
        }
        self.url = ""
        """For HAT_OPERATOR_DEVICES_URL."""

    def move(self) -> None:
        """Make each uplink at least half as fast again, or slow."""
        with self._lock:
            for name, rate in self._uplinks.items():
                factor = self._random.uniform(1.5, 3)
                self._uplinks[name] = rate * factor if rate < 3e6 else rate / factor

    def hold(self, uplinks_mbps: Mapping[str, float]) -> None:
        """From now on stay about these rates."""
        with self._lock:
            self._uplinks |= {name: rate * 125_000 for name, rate in uplinks_mbps.items()}

    @contextmanager
    def serving(self) -> Iterator[CloudPods]:
        """Serve on a free port of loopback, inside the block."""
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                policy = cloud.policies[self.path.split("/")[2]].current.to_json().encode()
                body = policy if self.path.endswith("/v1/policy") else cloud._answer(self.path)
                self.reply(503 if cloud.silent else 200, body)

            def do_PUT(self) -> None:
                store = cloud.policies[self.path.split("/")[2]]
                try:
                    store.put(self.rfile.read(int(self.headers["Content-Length"])))
                except (PolicyError, OlderDocument) as error:
                    self.reply(400 if isinstance(error, PolicyError) else 409, str(error).encode())
                else:
                    self.reply(200, store.current.to_json().encode())

            def reply(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Nobody reads it."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}/{{namespace}}/{{pod}}/v1/devices"
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def _answer(self, path: str) -> bytes:
        pod = path.split("/")[2]
        names = self._devices.get(pod.rpartition("-cloud-")[0], ())
        with self._lock:
            rows = [
                {
                    "name": name,
                    "seconds_since_contact": 120.0
                    if name in self.quiet
                    else round(self._random.uniform(0, 5), 3),
                    "chunk_tokens": 128,
                    "uplink_bytes_per_s": self._uplinks[name] * self._random.uniform(1 - JITTER, 1 + JITTER),
                    "rtt_s": 0.02,
                }
                for name in names
            ]
        content: dict[str, object] = {"devices": rows, "policy_version": self.policies[pod].current.version}
        if self._tuning:
            for row in rows:
                row |= {"row_bytes": 1152, "shallow_s_per_token": 5e-5}
            # The default model on one core (design.md 11).
            content["cost"] = {"fixed_s": 0.03, "per_token_s": 5e-4, "per_pair_s": 1e-7, "per_cached_s": 0.0}
            content["load"] = {"wait_s": 0.004, "company_tokens": 0.0, "prompt_rows": 512}
        return json.dumps(content).encode()
