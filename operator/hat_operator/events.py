"""Kubernetes events about a HatDeployment."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any

from hat_operator import names
from hat_operator.cluster import Cluster, ClusterError

log = logging.getLogger(__name__)
_MESSAGE_MAX = 1000


async def post(cluster: Cluster, body: Mapping[str, Any], kind: str, reason: str, message: str) -> None:
    """Record an event; `kind` is Normal or Warning. One that cannot be recorded is only logged."""
    meta, now = body["metadata"], rfc3339()
    about = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "name": meta["name"],
        "namespace": meta["namespace"],
        "uid": meta["uid"],
    }
    event = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{meta['name']}.{uuid.uuid4().hex[:16]}", "namespace": meta["namespace"]},
        "involvedObject": about,
        "type": kind,
        "reason": reason,
        "message": message[:_MESSAGE_MAX],
        "source": {"component": names.FIELD_MANAGER},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
    level = logging.WARNING if kind == "Warning" else logging.INFO
    log.log(level, "%s/%s: %s: %s", meta["namespace"], meta["name"], reason, message)
    try:
        await cluster.create(event)
    except ClusterError as error:
        log.warning("event %s of %s/%s: %s", reason, meta["namespace"], meta["name"], error)


def rfc3339(seconds: float | None = None) -> str:
    """A time (seconds since 1970; None: now) as the API writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
