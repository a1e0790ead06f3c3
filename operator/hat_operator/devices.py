"""Rows of status.devices from the nodes and pods of the devices' cluster. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from hat_operator import figures, names
from hat_operator.rollout import revision_of

MAX_ROWS = 200
READY, NOT_READY, LOST, PENDING = "Ready", "NotReady", "Lost", "Pending"


@dataclass(frozen=True)
class Fleet:
    """All devices."""

    rows: list[dict[str, Any]]
    """At most MAX_ROWS; those that are not ready first, then by name."""
    wanted: int
    phases: Mapping[str, int]

    @property
    def ready(self) -> int:
        """Devices that serve."""
        return self.phases.get(READY, 0)

    @property
    def lost(self) -> int:
        """Devices whose node does not answer."""
        return self.phases.get(LOST, 0)


def fleet(
    pods: Iterable[Mapping[str, Any]],
    nodes: Sequence[Mapping[str, Any]] | None,
    previous: Sequence[Mapping[str, Any]],
    now: str,
) -> Fleet:
    """One row for each device.

    Args:
        pods: the devices' pods.
        nodes: the nodes that the device selector matches; None if the operator may not read nodes, and then only
            devices that have a pod are known, and none is seen to be Lost.
        previous: the rows before; their figures stay (figures.Pace changes them).
        now: RFC 3339; lastSeen of a row whose phase has changed.
    """
    by_node: dict[str, Mapping[str, Any]] = {}
    for pod in pods:
        node = node_of(pod)
        if node and "deletionTimestamp" not in pod["metadata"] and not _better(by_node.get(node), pod):
            by_node[node] = pod
    known = {node["metadata"]["name"]: node for node in nodes or ()}
    before = {row["name"]: row for row in previous}
    rows = []
    for name in sorted(known.keys() if nodes is not None else by_node.keys()):
        phase = _phase(by_node.get(name), known.get(name))
        old = before.get(name, {})
        seen = old.get("lastSeen") if old.get("phase") == phase else None
        row = {"name": name, "node": name, "phase": phase, "lastSeen": seen or now, **figures.of_row(old)}
        l4t = known.get(name, {}).get("metadata", {}).get("labels", {}).get(names.LABEL_L4T)
        rows.append({**row, "l4t": l4t} if l4t else row)
    phases = Counter(row["phase"] for row in rows)
    shown = sorted(rows, key=lambda row: (row["phase"] == READY, row["name"]))[:MAX_ROWS]
    return Fleet(shown, len(rows), phases)


def revisions_in_use(
    pods: Iterable[Mapping[str, Any]], nodes: Sequence[Mapping[str, Any]] | None
) -> frozenset[str]:
    """Revisions of the pods on devices that answer: their cloud must stay until they have moved."""
    lost = {node["metadata"]["name"] for node in nodes or () if not is_ready(node)}
    found = {
        revision_of(pod)
        for pod in pods
        if node_of(pod) not in lost and pod.get("status", {}).get("phase") == "Running"
    }
    return frozenset(revision for revision in found if revision)


def unavailable(
    daemonsets: Iterable[Mapping[str, Any]],
    pods: Sequence[Mapping[str, Any]],
    nodes: Iterable[Mapping[str, Any]] | None,
) -> dict[str, int]:
    """How many devices may be without a ready pod, by a DaemonSet's name: those that are off, and a tenth of the rest.

    Kubernetes counts a device that is off among those that are being updated (pkg/controller/daemon/update.go), so at a
    site of ten a tenth would be that one, and no other would be updated. Only of DaemonSets whose update is under way
    with devices that are off: else a device that comes or goes changes nothing.
    """
    off = {node["metadata"]["name"] for node in nodes or () if not is_ready(node)}
    found = {}
    for daemonset in daemonsets:
        status = daemonset.get("status", {})
        if status.get("updatedNumberScheduled", 0) >= status.get("desiredNumberScheduled", 0):
            continue
        there = {node_of(pod) for pod in pods if _kind(pod) == _kind(daemonset)}
        lost = len(there & off)
        if lost:
            found[str(daemonset["metadata"]["name"])] = lost + ceil((len(there) - lost) / 10)
    return found


def node_of(pod: Mapping[str, Any]) -> str | None:
    """The node that a pod of a DaemonSet runs on or waits for."""
    spec = pod.get("spec", {})
    if spec.get("nodeName"):
        return str(spec["nodeName"])
    affinity = spec.get("affinity", {}).get("nodeAffinity", {})
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {})
    for term in required.get("nodeSelectorTerms", ()):
        for field in term.get("matchFields", ()):
            if field.get("key") == "metadata.name" and field.get("values"):
                return str(field["values"][0])
    return None


def is_ready(obj: Mapping[str, Any]) -> bool:
    """Whether a node's kubelet answers and says that it is ready, or a pod serves."""
    return _condition(obj) == "True"


def _phase(pod: Mapping[str, Any] | None, node: Mapping[str, Any] | None) -> str:
    if node is not None and not is_ready(node):
        return LOST
    if pod is None or pod.get("status", {}).get("phase", "Pending") == "Pending":
        return PENDING
    return READY if is_ready(pod) else NOT_READY


def _better(first: Mapping[str, Any] | None, second: Mapping[str, Any]) -> bool:
    """Whether the first of two pods on one node tells more: during an update there may be two."""
    return first is not None and (is_ready(first) or not is_ready(second))


def _kind(obj: Mapping[str, Any]) -> str | None:
    """Which of edge.images it is for."""
    kind: str | None = obj["metadata"].get("labels", {}).get(names.LABEL_IMAGE)
    return kind


def _condition(obj: Mapping[str, Any]) -> str | None:
    for condition in obj.get("status", {}).get("conditions", ()):
        if condition["type"] == "Ready":
            return str(condition["status"])
    return None
