"""Streamed answers of devices, many at once, each asked on its device's node; and what came of them.

Run as a program it is the client: `Streams` starts one for each node. It asks what it reads on its standard input, and
tells on its standard output, a line of JSON for each event, what a user would see.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
SILENCE_S = 180.0
"""A stream that says nothing for so long is given up."""
AGAIN_FOR_S = 300.0
_AGAIN_S = 0.5
CUT_OFF = "cut off"
"""A stream that ended without its last line and without an error."""
GIVEN_UP = "gave up"
NOT_ACCEPTED = ("unreachable", "shutting_down")
"""Refusals of a request that no device has accepted: clients ask again, as OpenAI's do."""


@dataclass
class Reply:
    """What a client saw of one answer."""

    number: int
    """Of the question."""
    text: str = ""
    finish: str = ""
    """The reason that the last chunk names; empty: the answer did not end."""
    tokens: int = 0
    resumes: int = 0
    """Times it went on after the cloud was lost, by its usage."""
    error: str = ""
    """Code of the error that it ended with."""
    pieces: int = 0
    refusals: int = 0
    """Times that it was not accepted before it was."""
    pause_s: float = 0.0
    """The longest time between two pieces."""
    _last_s: float = 0.0

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return bool(self.finish or self.error)

    def see(self, event: Mapping[str, Any]) -> None:
        """Takes the client's next event of this answer."""
        if "refused" in event:
            self.refusals += 1
        elif "error" in event:
            self.error = event["error"]
        elif "usage" in event:
            self.finish = event["finish"]
            self.tokens = event["usage"]["completion_tokens"]
            self.resumes = event["usage"]["hat"]["resumes"]
        else:
            if self.pieces:
                self.pause_s = max(self.pause_s, event["at"] - self._last_s)
            self._last_s = event["at"]
            self.pieces += 1
            self.text += event["text"]


@dataclass(frozen=True)
class Place:
    """Where a client runs, and whom it asks."""

    prefix: Sequence[str]
    """Comes before the command, as Sandbox.network_only."""
    url: str


class Streams:
    """Questions under way, spread over places in turn; `join` returns what came of all of them."""

    def __init__(
        self, places: Sequence[Place], bodies: Sequence[Mapping[str, Any]], again: bool = False
    ) -> None:
        """Starts at once.

        Args:
            places: one client each.
            bodies: requests of the chat API; their places in the list are their numbers.
            again: each question is asked again and again, until `stop`.
        """
        self.replies: list[Reply] = [Reply(number) for number in range(len(bodies))]
        """Of each question the first answer, then those that ended later and are asked again."""
        self._latest = dict(enumerate(self.replies))
        self._lock = threading.Lock()
        self._clients = [self._start(place) for place in places]
        for index, client in enumerate(self._clients):
            asked = {n: body for n, body in enumerate(bodies) if n % len(places) == index}
            order = {"url": places[index].url, "bodies": asked, "again": again}
            assert client.stdin is not None
            client.stdin.write(json.dumps(order) + "\n")
            client.stdin.flush()
        self._readers = [
            threading.Thread(target=self._read, args=(client,), daemon=True) for client in self._clients
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _start(place: Place) -> subprocess.Popen[str]:
        command = [*place.prefix, sys.executable, "-m", "tests.e2e.streams"]
        return subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def _read(self, client: subprocess.Popen[str]) -> None:
        assert client.stdout is not None
        for line in client.stdout:
            event = json.loads(line)
            with self._lock:
                reply = self._latest[event["number"]]
                if reply.over:
                    reply = self._latest[event["number"]] = Reply(event["number"])
                    self.replies.append(reply)
                reply.see(event)

    def now(self) -> list[Reply]:
        """The latest answer to each question; they may still grow."""
        with self._lock:
            return list(self._latest.values())

    @property
    def pieces(self) -> int:
        """Pieces of all answers so far."""
        with self._lock:
            return sum(reply.pieces for reply in self.replies)

    def stop(self) -> None:
        """Lets the answers under way end, and asks no more."""
        for client in self._clients:
            if client.stdin is not None and not client.stdin.closed:
                client.stdin.close()

    def join(self, timeout_s: float) -> list[Reply]:
        """Waits for all answers to end. Raises TimeoutError; RuntimeError where a client failed."""
        deadline = time.monotonic() + timeout_s
        try:
            for client, reader in zip(self._clients, self._readers, strict=True):
                reader.join(max(0.0, deadline - time.monotonic()))
                if reader.is_alive():
                    raise TimeoutError(f"answers have not ended after {timeout_s:.0f} s")
                if client.wait(10):
                    raise RuntimeError(f"a client ended with exit code {client.returncode}")
        finally:
            self.kill()
        return self.replies

    def kill(self) -> None:
        """Ends the clients at once."""
        self.stop()
        for client in self._clients:
            client.kill()
            client.wait()
            if client.stdout is not None:
                client.stdout.close()


def _tell(number: int, **event: Any) -> None:
    print(json.dumps({"number": number, **event}), flush=True)


async def _ask(client: httpx.AsyncClient, url: str, number: int, body: Mapping[str, Any]) -> bool:
    """One answer, told piece by piece; False, after a moment, where no device has accepted it."""
    finish, figures = "", dict[str, Any]()
    try:
        async with client.stream("POST", url, json=body) as reply:
            if reply.status_code != 200:
                code = json.loads(await reply.aread())["error"]["code"]
                _tell(number, **{"refused" if code in NOT_ACCEPTED else "error": code})
                await asyncio.sleep(_AGAIN_S)
                return code not in NOT_ACCEPTED
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    _tell(number, usage=figures, finish=finish)
                    return True
                if not line.startswith("data: "):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    _tell(number, error=chunk["error"]["code"])
                    return True
                figures = chunk.get("usage") or figures
                for choice in chunk["choices"]:
                    finish = choice["finish_reason"] or finish
                    if text := choice["delta"].get("content"):
                        _tell(number, text=text, at=time.monotonic())
            _tell(number, error=CUT_OFF)
    except (httpx.ConnectError, httpx.ConnectTimeout):
        _tell(number, refused="unreachable")
        await asyncio.sleep(_AGAIN_S)
        return False
    except httpx.HTTPError as error:
        _tell(number, error=f"{CUT_OFF}: {type(error).__name__}: {error}")
    return True


async def _keep_asking(
    client: httpx.AsyncClient,
    url: str,
    number: int,
    body: Mapping[str, Any],
    again: bool,
    ends: asyncio.Event,
) -> None:
    since = time.monotonic()
    while True:
        if await _ask(client, url, number, body):
            since = time.monotonic()
            if not again or ends.is_set():
                return
        elif time.monotonic() - since > AGAIN_FOR_S:
            _tell(number, error=GIVEN_UP)
            return


async def main() -> None:
    """Asks what the first line of standard input says; its end says that nothing is to be asked again."""
    order = json.loads(sys.stdin.readline())
    ends = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait_for_end() -> None:
        # Not sys.stdin: its lock would keep this process from ending.
        while os.read(0, 4096):
            pass
        loop.call_soon_threadsafe(ends.set)

    threading.Thread(target=wait_for_end, daemon=True).start()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    timeout = httpx.Timeout(SILENCE_S, connect=10.0)
    async with httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False) as client:
        await asyncio.gather(
            *(
                _keep_asking(client, order["url"], int(number), body, order["again"], ends)
                for number, body in order["bodies"].items()
            )
        )


if __name__ == "__main__":
    asyncio.run(main())
