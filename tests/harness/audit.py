"""Requests to an apiserver as its audit log shows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

WRITING = ("create", "update", "patch", "delete", "deletecollection")


@dataclass(frozen=True)
class Request:
    """One request that has been answered."""

    received: float
    """When the apiserver got it, in seconds since 1970."""
    done: float
    """When it had answered."""
    verb: str
    resource: str
    """With the subresource: hatdeployments/status."""
    namespace: str
    name: str
    code: int


def requests(events: Iterable[Mapping[str, Any]], agent: str = "") -> list[Request]:
    """Requests of the programs whose user agent begins with `agent`, in order, but for Leases: they are heartbeats."""
    found = []
    for event in events:
        about = event.get("objectRef", {})
        if not event.get("userAgent", "").startswith(agent) or about.get("resource") == "leases":
            continue
        found.append(
            Request(
                _seconds(event["requestReceivedTimestamp"]),
                _seconds(event["stageTimestamp"]),
                event["verb"],
                "/".join(filter(None, (about.get("resource"), about.get("subresource")))),
                about.get("namespace", ""),
                about.get("name", ""),
                event.get("responseStatus", {}).get("code", 0),
            )
        )
    return sorted(found, key=lambda request: request.received)


def by_user(events: Iterable[Mapping[str, Any]], user: str) -> Iterator[Mapping[str, Any]]:
    """The events of one user. Those of requests without a valid credential name none."""
    return (event for event in events if event["user"].get("username") == user)


def writes(events: Iterable[Mapping[str, Any]], agent: str) -> list[Request]:
    """Those requests that write, whether they succeeded or not."""
    return [request for request in requests(events, agent) if request.verb in WRITING]


def most_in_window(times: Iterable[float], seconds: float) -> int:
    """The largest number of times in any stretch shorter than `seconds`."""
    ordered = sorted(times)
    return max(
        (sum(begin <= time < begin + seconds for time in ordered) for begin in ordered),
        default=0,
    )


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
