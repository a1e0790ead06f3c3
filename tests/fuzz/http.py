"""HTTP requests that are nearly right: mutated JSON, odd headers and paths, and bytes that are nearly HTTP."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from dataclasses import dataclass
from typing import Any

ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    -(2**64),
    10**400,
    0.0,
    -0.0,
    0.5,
    5e-324,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "\x00",
    "\ud800",
    "\U0001f642" * 50,
    "é\u202e\u0301\ufeff",
    "{reason} %s $(HOME) ${x} <script>",
    "x" * 20_000,
    [],
    [[]],
    {},
    [None, 1, "a", {}],
    {"": ""},
    {"type": "text", "text": "hi"},
    [{"type": "text", "text": "hi"}, {"type": "text"}, {"type": "image_url", "image_url": {"url": "x"}}],
    [1, 2, 3],
    [[1, 2], ["a"]],
    [True, 2],
]
"""Values that some reader may stumble over."""
HEADERS = [
    b"X-Request-ID: " + b"x" * 9000,
    b"X-Request-ID: \xff\xfe\x80",
    b"X-Request-ID: a\tb",
    b"Authorization: Bearer ",
    b"Authorization: Bearer \xe9\xff",
    b"Authorization: Basic Og==",
    b"Content-Type: text/plain",
    b"Content-Type: application/json; charset=utf-16",
    b"Accept: */*;q=nan",
    b"Accept-Encoding: gzip, br;q=0",
    b"Range: bytes=0-18446744073709551616",
    b"If-None-Match: *",
    b"Cookie: a=" + b"b" * 4000,
    b"Expect: 200-maybe",
    b"Origin: null",
    b"Host: [::1",
]


@dataclass(frozen=True)
class Request:
    """Bytes to send. `malformed` may be answered by the end of the connection; of a `cut` one no answer is read."""

    kind: str
    data: bytes
    malformed: bool = False
    cut: bool = False


@dataclass(frozen=True)
class Reply:
    """Status 0: the connection ended without one."""

    status: int
    body: bytes


class Requests:
    """Requests made from right ones.

    Args:
        seed: of everything that is drawn.
        right: (method, path, JSON body or None) of requests that succeed.
    """

    def __init__(self, seed: int, right: list[tuple[str, str, Any]]) -> None:
        self.rng = random.Random(seed)
        self.right = right

    def next(self) -> Request:
        """One request."""
        rng = self.rng
        method, path, body = rng.choice(self.right)
        kind = rng.random()
        if kind < 0.08:
            return Request("right", http(method, path, _bytes(body)))
        if kind < 0.14 and body is not None:
            return Request("cut", http(method, path, _bytes(body)), cut=True)
        if kind < 0.2:
            data = http(method, path, _bytes(body), rng.sample(HEADERS, rng.randint(1, 3)))
            return Request("headers", data, malformed=True)
        if kind < 0.28:
            return Request("path", http(*self.elsewhere(method, path), _bytes(body)), malformed=True)
        if kind < 0.34:
            return Request("bytes", self.changed(http(method, path, _bytes(body))), malformed=True)
        if kind < 0.42 or body is None:
            body = self.garbage()
            # A server that does not want a long body closes the connection, which may reach us before its reply.
            data = http(rng.choice(["POST", "PUT", method]), path, body)
            return Request("body", data, malformed=len(body) > 60_000)
        if kind < 0.5:
            return Request("JSON text", http(method, path, self.changed(_bytes(body))))
        data = http(method, path, _bytes(self.mutated(body)))
        return Request("JSON", data, malformed=len(data) > 60_000)

    def mutated(self, body: Any) -> Any:
        """The same with one to three values replaced, removed, added or wrapped."""
        rng = self.rng
        body = copy.deepcopy(body)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            place = body
            while isinstance(place, dict | list) and place:
                key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
                below = place[key]  # type: ignore[index]
                if isinstance(below, dict | list) and below and rng.random() < 0.6:
                    place = below
                    continue
                self.spoil(place, key)
                break
        return rng.choice(ODD) if rng.random() < 0.02 else body

    def spoil(self, place: Any, key: Any) -> None:
        """Change what is at `key` of an object or list."""
        rng = self.rng
        way = rng.random()
        if way < 0.6:
            place[key] = copy.deepcopy(rng.choice(ODD))
        elif way < 0.7 and key != "max_tokens":
            del place[key]
        elif way < 0.8:
            place[key] = [place[key]]
        elif way < 0.9 and isinstance(place, dict):
            place[rng.choice(["", "n", "tools", "logprobs", "user", "x" * 300, "\ud800"])] = rng.choice(ODD)
        elif isinstance(place, list):
            place += [copy.deepcopy(place[key])] * rng.choice([1, 200])
        else:
            place[key] = {"a": place[key]}

    def garbage(self) -> bytes:
        """A body that is no object, or hardly JSON."""
        rng = self.rng
        depth = rng.choice([10, 1000, 100_000])
        return rng.choice(
            [
                b"",
                b"null",
                b"\xff\xfe{\x00}\x00",
                b"\xef\xbb\xbf{}",
                b"[" * depth,
                b'{"messages":' * depth + b"1" + b"}" * depth,
                b'{"model":"tiny","model":1,"prompt":"a","prompt":[]}',
                b'{"max_tokens":' + b"9" * depth + b"}",
                b'{"temperature":1e' + b"9" * depth + b"}",
                b'"' + b"\\ud800" * 20 + b'"',
                rng.randbytes(rng.randint(1, 300)),
            ]
        )

    def elsewhere(self, method: str, path: str) -> tuple[str, str]:
        """Another method or path."""
        rng = self.rng
        return rng.choice(
            [
                (rng.choice(["DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW", "get"]), path),
                (method, path + "/"),
                (
                    method,
                    path + "?after=" + rng.choice(["-1", "1e9", "%00", "9" * 30, "\u0663", "1&after=2", "5"]),
                ),
                (method, "/" + path),
                (method, path.replace("v1", "v1/../v1")),
                (
                    method,
                    rng.choice(
                        ["*", "/%00", "/%ff%fe", "/" + "a" * 5000, "/v1/models/%2e%2e%2fx", "/v1/models/"]
                    ),
                ),
            ]
        )

    def changed(self, data: bytes) -> bytes:
        """The same with a few bytes replaced, put in or left out."""
        found = bytearray(data)
        for _ in range(self.rng.randint(1, 5)):
            if found:
                at = self.rng.randrange(len(found))
                found[at : at + self.rng.randint(0, 3)] = self.rng.randbytes(self.rng.randint(0, 3))
        return bytes(found)


def http(method: str, path: str, body: bytes, headers: list[bytes] | None = None) -> bytes:
    """An HTTP/1.1 request whose connection ends with its reply."""
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: device", b"Connection: close"]
    lines += [b"Content-Type: application/json", f"Content-Length: {len(body)}".encode(), *(headers or [])]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def send(host: str, port: int, request: Request, timeout_s: float = 60.0) -> Reply:
    """Send it and read the whole reply; a request whose bytes say more than they hold is ended by this side."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(request.data)
        await writer.drain()
        if request.cut:
            await asyncio.sleep(0.001)
            return Reply(0, b"")
        data = bytearray()
        # The server may still wait for the rest of what changed bytes announce.
        async with asyncio.timeout(0.3 if request.kind == "bytes" else timeout_s):
            while part := await reader.read(1 << 16):
                data += part
    except ConnectionError:
        return Reply(0, b"")
    except TimeoutError:
        if request.kind != "bytes":
            raise
    finally:
        writer.close()
    head, _, body = bytes(data).partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    return Reply(int(words[1]) if len(words) > 1 and words[0].startswith(b"HTTP/") else 0, body)


def _bytes(body: Any) -> bytes:
    return b"" if body is None else json.dumps(body).encode()
