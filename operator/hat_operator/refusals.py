"""Why the API server does not take the pods of a Deployment or DaemonSet: quotas, pod security, webhooks."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from typing import Any

from hat_operator import names
from hat_operator.cluster import Cluster, ClusterError
from hat_operator.events import rfc3339
from hat_operator.kinds import EVENT

log = logging.getLogger(__name__)
_LATELY_S = 1200.0
Object = Mapping[str, Any]


def of_deployment(deployment: Object | None) -> str | None:
    """As its controller says in a condition, which it takes back itself."""
    conditions = () if deployment is None else deployment.get("status", {}).get("conditions", ())
    for condition in conditions:
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            return refusal_text(str(condition["message"]))
    return None


async def of_daemonset(cluster: Cluster, daemonset: Object) -> str | None:
    """As its controller says in events, where a device has no pod; None where nobody knows.

    Only what was said since the operator changed the DaemonSet last, and lately: its controller tries again after
    1,000 s at the latest. A request that fails is only logged: this explains something, and nothing depends on it.
    """
    meta = daemonset["metadata"]
    fields = f"involvedObject.uid={meta['uid']},reason=FailedCreate"
    try:
        found = await cluster.list(EVENT, meta["namespace"], fields=fields)
    except ClusterError as error:
        log.debug("events of %s/%s: %s", meta["namespace"], meta["name"], error)
        return None
    applied = (
        entry.get("time", "")
        for entry in meta.get("managedFields", ())
        if entry.get("manager") == names.FIELD_MANAGER
    )
    since = max(rfc3339(time.time() - _LATELY_S), *applied)
    said = [event for event in found if (event.get("lastTimestamp") or "") >= since]
    newest = max(said, key=lambda event: event["lastTimestamp"], default=None)
    return None if newest is None else refusal_text(newest.get("message", ""))


def refusal_text(message: str) -> str:
    """A controller's message without the pod's name, which is another one at each try."""
    return re.sub(r'^(.*?Error creating: )?((pods|Pod) "[^"]*" )?', "", message)
