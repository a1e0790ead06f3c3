"""Kubernetes events about a HatDeployment."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

from hat_operator import names
from hat_operator.cluster import Cluster, ClusterError
from hat_operator.kinds import EVENT

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


async def why_no_pods(cluster: Cluster, workload: Mapping[str, Any]) -> str | None:
    """What the API server said when the workload's controller could not create a pod; None where nobody knows.

    Raises:
        ClusterError: a request failed, but for missing rights.
    """
    meta = workload["metadata"]
    fields = f"involvedObject.uid={meta['uid']},reason=FailedCreate"
    try:
        found = await cluster.list(EVENT, meta["namespace"], fields=fields)
    except ClusterError as error:
        if error.reason == "Forbidden":
            return None
        raise
    newest = max(found, key=lambda event: event.get("lastTimestamp") or "", default=None)
    # Without the pod's name, which is another one at each try.
    return None if newest is None else re.sub(r'^.*?Error creating: (pods "[^"]*" )?', "", newest["message"])


def rfc3339(seconds: float | None = None) -> str:
    """A time (seconds since 1970; None: now) as the API writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
