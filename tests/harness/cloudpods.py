"""A stand-in for the cloud's pods: what they would tell of their devices, for the operator to ask.

kwok's pods have addresses that lead nowhere, so the operator is told by HAT_OPERATOR_DEVICES_URL to ask here.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

JITTER = 0.05
"""Every answer differs from the one before by up to this part: real figures never stand still."""


class CloudPods:
    """Serves GET /NAMESPACE/POD/v1/devices in the form of hat_runtime/cloud/devices.py."""

    def __init__(self, devices: Mapping[str, Sequence[str]]) -> None:
        """`devices` are the names of the devices of each HatDeployment."""
        self._devices = devices
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
                body = cloud._answer(self.path)
                self.send_response(200)
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
                    "seconds_since_contact": round(self._random.uniform(0, 5), 3),
                    "chunk_tokens": 128,
                    "uplink_bytes_per_s": self._uplinks[name] * self._random.uniform(1 - JITTER, 1 + JITTER),
                    "rtt_s": 0.02,
                }
                for name in names
            ]
        return json.dumps({"devices": rows}).encode()
