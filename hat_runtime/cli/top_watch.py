"""Asking devices for their figures, and remembering the latest ones."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from hat_runtime.errors import UsageError
from hat_runtime.security.keys import read_keys

PATH = "/v1/hat/stats"
TIMEOUT_S = 5.0
KEPT = 400
"""Values of a figure: more than fit a terminal's line."""
MAX_REPLY_BYTES = 4 << 20

SAMPLED = ("chunk_tokens", "uplink_bytes_per_s", "rtt_s", "acceptance")
"""One value a look; of the others there is one an answer."""
PER_ANSWER = ("ttft_s", "predicted_ttft_s", "tbt_s")


@dataclass
class Device:
    """One device, as far as it is known."""

    url: str
    stats: dict[str, Any] | None = None
    """What it said last; None: nothing yet."""
    error: str | None = None
    """Why it said nothing this time."""
    values: dict[str, deque[float]] = field(
        default_factory=lambda: {name: deque(maxlen=KEPT) for name in (*SAMPLED, *PER_ANSWER)}
    )
    """Of every figure, the oldest first."""
    seen: int = 0
    """Number of the last answer whose figures are among the values."""

    def take(self, stats: dict[str, Any]) -> None:
        """What it says now."""
        restarted = self.stats is not None and stats["started"] != self.stats["started"]
        self.stats, self.error = stats, None
        for name in SAMPLED:
            self._add(name, stats.get(name))
        if restarted:
            self.seen = 0
        for answer in stats.get("recent", ()):
            if answer["number"] > self.seen:
                self.seen = answer["number"]
                for name in PER_ANSWER:
                    self._add(name, answer[name])

    def latest(self, name: str) -> float | None:
        """The present value: of the answer under way that began last, else the last one that was seen."""
        stats = self.stats or {}
        if name in SAMPLED:
            value: float | None = stats.get(name)
            return value
        for answer in reversed(stats.get("running", ())):
            if answer[name] is not None:
                return float(answer[name])
        return self.values[name][-1] if self.values[name] else None

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return {"url": self.url, "error": self.error, "stats": None if self.error else self.stats}

    def _add(self, name: str, value: float | None) -> None:
        if value is not None:
            self.values[name].append(value)


class Watch:
    """Several devices, asked at the same time.

    Args:
        urls: base URLs, with or without /v1.
        key: sent to each of them, if not None.

    Raises:
        UsageError: a URL that is none; names --url and echoes it.
    """

    def __init__(self, urls: Sequence[str], key: str | None = None) -> None:
        self.devices = [Device(_base(url)) for url in urls]
        self._key = key
        self._threads = ThreadPoolExecutor(max_workers=min(32, len(urls)))

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def look(self) -> None:
        """Ask all devices; what goes wrong with one of them stands in its `error`."""
        for _ in self._threads.map(self._ask, self.devices):
            pass

    def _ask(self, device: Device) -> None:
        try:
            device.take(self._get(f"{device.url}{PATH}?after={device.seen}"))
        except urllib.error.HTTPError as error:
            with error:
                device.error = _refusal(error)
        except TimeoutError:
            device.error = f"no answer in {TIMEOUT_S:g} s"
        except urllib.error.URLError as error:
            late = isinstance(error.reason, TimeoutError)
            device.error = (
                f"no answer in {TIMEOUT_S:g} s" if late else f"not reachable: {_plain(error.reason)}"
            )
        except (OSError, http.client.HTTPException) as error:
            device.error = f"not reachable: {_plain(error)}"
        except (ValueError, KeyError, TypeError):
            device.error = f"{PATH} is not that of a HAT device: is this the right URL?"

    def _get(self, url: str) -> dict[str, Any]:
        request = urllib.request.Request(url)  # noqa: S310 (the user says which)
        if self._key is not None:
            request.add_header("Authorization", f"Bearer {self._key}")
        with _OPENER.open(request, timeout=TIMEOUT_S) as reply:
            found = json.loads(reply.read(MAX_REPLY_BYTES))
        if not isinstance(found, dict) or not found.keys() >= {"model", "started", "cloud", "sessions"}:
            raise ValueError("other JSON")
        return found


def read_key(path: Path) -> str:
    """The first key of a key file.

    Raises:
        UsageError: it cannot be read, or has none.
    """
    keys = read_keys(path)
    if not keys:
        raise UsageError(f"--api-key-file {path} has no key in it")
    return keys[0]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    # Elsewhere the key has no business.
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def _base(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--url {url!r}: must be http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1")


def _refusal(error: urllib.error.HTTPError) -> str:
    if error.code == 404:
        return "it has no live figures: a device of an older version, or no device (status 404)"
    if error.code == 401:
        return "it asks for an API key: --api-key-file (status 401)"
    try:
        return f"status {error.code}: {json.loads(error.read(MAX_REPLY_BYTES))['error']['message']}"
    except (ValueError, KeyError, TypeError, OSError):
        return f"status {error.code} {error.reason}"


def _plain(reason: object) -> str:
    text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
    return text[:1].lower() + text[1:]
