"""Conditions and numbers of status from what was seen. Pure.

Conditions are positive (True is good, but for Progressing) and say something about themselves only; Ready takes over
the reason of the first one that does not hold. Reasons are part of the API.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hat_operator import names
from hat_operator.devices import PENDING, Fleet
from hat_operator.policy import adaptive
from hat_operator.spec import HatDeployment

READY, CLOUD_READY, EDGE_READY = "Ready", "CloudReady", "EdgeReady"
EDGE_REACHABLE, SPLIT_VALID, PROGRESSING = "EdgeClusterReachable", "ModelSplitValid", "Progressing"
METRICS_AVAILABLE, IDENTITIES_SIGNED = "MetricsAvailable", "IdentitiesSigned"
_READY_NEEDS = (SPLIT_VALID, IDENTITIES_SIGNED, CLOUD_READY, EDGE_REACHABLE, EDGE_READY)
_MESSAGE_MAX = 1024


@dataclass(frozen=True)
class Finding:
    """A condition without its times."""

    status: str
    reason: str
    message: str


@dataclass(frozen=True)
class Problem:
    """Why a part could not be brought to its desired state."""

    reason: str
    message: str


@dataclass(frozen=True)
class MetricsSeen:
    """Whether the cloud's pods told what they know of the devices when they were last asked."""

    telling: int = 0
    """Ready pods that answer."""
    silent: int = 0
    """Ready pods that have not answered for a while."""
    asked: int = 0
    """Ready pods that have not answered yet, but were not asked long ago."""
    error: str = ""
    """What one of the silent ones said instead."""
    source: str = ""
    """Who was asked in their place, in words; then the counts are of it."""

    @property
    def frozen(self) -> bool:
        """Whether nothing fresh is known, though there are replicas that should tell."""
        return bool(self.silent) and not self.telling and not self.asked


@dataclass(frozen=True)
class CloudSeen:
    """The cloud's side after a reconcile. Replicas and ready ones are those of the revision that serves."""

    wanted_revision: str
    serving_revision: str | None
    replicas: int = 0
    ready: int = 0
    updated: bool = True
    """Whether the wanted revision's Deployment has all its pods as the spec wants them."""
    endpoint: str | None = None
    problem: Problem | None = None
    refused: str | None = None
    """Why the API server does not take the wanted revision's pods."""
    metrics: MetricsSeen | None = None
    """None: nobody has been asked since this process started."""
    identities: Finding | None = None
    """None: there are no certificates."""


@dataclass(frozen=True)
class EdgeSeen:
    """The devices' side after a reconcile; fleet None: unknown, what was known before stays."""

    fleet: Fleet | None = None
    updated: bool = True
    """Whether every DaemonSet has rolled out to each of its devices."""
    unreachable: Problem | None = None
    problem: Problem | None = None
    refused: str | None = None
    """Why the API server does not take a device's pod."""


def model_text(hat: HatDeployment) -> str:
    """The model in short."""
    model = hat.spec.model
    if model.claim is not None:
        return f"claim {model.claim.name}/{model.claim.path}"
    return f"{model.hub}@{model.revision}" if model.revision else str(model.hub)


def findings(hat: HatDeployment, cloud: CloudSeen, edge: EdgeSeen) -> dict[str, Finding]:
    """All conditions that apply to this HatDeployment."""
    found = {SPLIT_VALID: _split(cloud), CLOUD_READY: _cloud(hat, cloud)}
    if cloud.identities is not None:
        found[IDENTITIES_SIGNED] = cloud.identities
    if hat.spec.edge is not None:
        if hat.spec.edge_cluster is not None:
            found[EDGE_REACHABLE] = _reachable(edge)
        found[EDGE_READY] = _edge(hat, cloud, edge)
        if cloud.metrics is not None:
            found[METRICS_AVAILABLE] = _metrics(hat, cloud.metrics)
    found[PROGRESSING] = _progressing(hat, cloud, edge)
    found[READY] = _ready(hat, found)
    return found


def invalid(message: str) -> dict[str, Finding]:
    """The conditions of a spec that cannot be read."""
    finding = Finding("False", "InvalidSpec", message)
    return {SPLIT_VALID: finding, READY: finding}


def new_status(
    hat: HatDeployment, old: Mapping[str, Any], cloud: CloudSeen, edge: EdgeSeen, now: str
) -> dict[str, Any]:
    """The whole status.

    Args:
        hat: what is wanted.
        old: the status before: times of unchanged conditions are taken from it.
        cloud: what was seen.
        edge: what was seen.
        now: RFC 3339.
    """
    wanted = 0 if hat.spec.suspend else hat.spec.cloud.replicas
    selector = names.selector(hat, names.CLOUD)
    before = old.get("conditions", ())
    status: dict[str, Any] = {
        "observedGeneration": hat.generation,
        "model": model_text(hat),
        "conditions": conditions(findings(hat, cloud, edge), before, hat.generation, now),
        "cloud": {
            "replicas": cloud.replicas,
            "ready": cloud.ready,
            "summary": f"{cloud.ready}/{wanted}",
            "selector": names.selector_text(dict(sorted(selector.items()))),
            "revision": cloud.serving_revision or cloud.wanted_revision,
        },
    }
    if cloud.metrics is None and hat.spec.edge is not None:
        known = [condition for condition in before if condition["type"] == METRICS_AVAILABLE]
        status["conditions"] = sorted([*status["conditions"], *known], key=lambda item: str(item["type"]))
    if cloud.endpoint is not None:
        status["cloud"]["endpoint"] = cloud.endpoint
    if hat.spec.edge is None:
        return status
    if edge.fleet is not None:
        fleet = edge.fleet
        summary = f"{fleet.ready}/{fleet.wanted}"
        status["edge"] = {"wanted": fleet.wanted, "ready": fleet.ready, "summary": summary}
        status["devices"] = fleet.rows
    else:
        status.update({key: old[key] for key in ("edge", "devices") if key in old})
    return status


def conditions(
    found: Mapping[str, Finding], old: Sequence[Mapping[str, Any]], generation: int, now: str
) -> list[dict[str, Any]]:
    """Conditions with their times; lastTransitionTime stays while the status is the same."""
    before = {condition["type"]: condition for condition in old}
    result = []
    for name, finding in sorted(found.items()):
        last = before.get(name, {})
        same = last.get("status") == finding.status
        result.append(
            {
                "type": name,
                "status": finding.status,
                "reason": finding.reason,
                "message": finding.message[:_MESSAGE_MAX],
                "lastTransitionTime": last["lastTransitionTime"] if same else now,
                "observedGeneration": generation,
            }
        )
    return result


def merge_patch(old: Any, new: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON merge patch (RFC 7386) from old to new; {} if they are equal."""
    old = old if isinstance(old, Mapping) else {}
    change: dict[str, Any] = {key: None for key in old if key not in new}
    for key, value in new.items():
        if key in old and old[key] == value:
            continue
        change[key] = merge_patch(old.get(key), value) if isinstance(value, Mapping) else value
    return change


def changes(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(type, reason, message) of an event for each condition whose status or reason has changed.

    Warning where a condition, having held, does not hold any more, or something went wrong; else Normal. Where a new
    HatDeployment starts is no event: its conditions say so, and many that come at once should cost little.
    """
    before = {condition["type"]: condition for condition in old}
    found = []
    for condition in new:
        last = before.get(condition["type"], {})
        if (last.get("status"), last.get("reason")) == (condition["status"], condition["reason"]):
            continue
        if condition["type"] == READY and condition["status"] != "True" and last.get("status") != "True":
            continue  # the condition that it took the reason from has its own event
        lost = last.get("status") == "True" and condition["status"] != "True"
        lost = lost and condition["reason"] not in _TAKES_NOTHING
        bad = condition["reason"] not in _EXPECTED and condition["status"] == "False"
        warning = condition["type"] != PROGRESSING and (lost or bad) and condition["reason"] != "Suspended"
        if not (last or warning or condition["status"] == "True"):
            continue
        text = f"{condition['type']} is {condition['status']}: {condition['message']}"
        found.append(("Warning" if warning else "Normal", condition["reason"], text))
    return found


_TAKES_NOTHING = {"NotLoadedYet", "NoReplicaAnswered", "ScaledToZero"}
"""Reasons of conditions that do not hold any more, without anybody's loss."""
_EXPECTED = {
    "WaitingForReplicas",
    "WaitingForDevices",
    "EndpointPending",
    "Suspended",
    "ScaledToZero",
    "Complete",
}


def _split(cloud: CloudSeen) -> Finding:
    if cloud.serving_revision == cloud.wanted_revision and cloud.ready:
        return Finding("True", "CloudLoadedModel", "the cloud has loaded its layers of the model")
    return Finding("Unknown", "NotLoadedYet", "known when a replica of this revision has loaded its layers")


def _cloud(hat: HatDeployment, cloud: CloudSeen) -> Finding:
    wanted = hat.spec.cloud.replicas
    if cloud.problem is not None:
        return Finding("False", cloud.problem.reason, cloud.problem.message)
    if hat.spec.suspend:
        return Finding("False", "Suspended", "spec.suspend is true")
    if wanted == 0:
        return Finding("False", "ScaledToZero", "spec.cloud.replicas is 0")
    counts = f"{cloud.ready} of {wanted} replicas are ready"
    if cloud.refused is not None and cloud.ready < wanted:
        return Finding("False", "PodsRefused", f"{counts}; the API server refuses others: {cloud.refused}")
    if cloud.ready < wanted:
        return Finding("False", "WaitingForReplicas", counts)
    if cloud.endpoint is None:
        return Finding("False", "EndpointPending", "the Service has no address for devices yet")
    return Finding("True", "ReplicasReady", counts)


def _reachable(edge: EdgeSeen) -> Finding:
    if edge.unreachable is not None:
        return Finding("False", edge.unreachable.reason, edge.unreachable.message)
    return Finding("True", "Reachable", "the devices' cluster answers")


def _edge(hat: HatDeployment, cloud: CloudSeen, edge: EdgeSeen) -> Finding:
    if edge.unreachable is not None:
        return Finding("Unknown", "EdgeClusterUnreachable", "the devices' cluster cannot be asked")
    if edge.problem is not None:
        return Finding("False", edge.problem.reason, edge.problem.message)
    if hat.spec.suspend:
        return Finding("False", "Suspended", "spec.suspend is true")
    if edge.fleet is None:
        return Finding("Unknown", "DevicesUnknown", "the devices could not be read")
    fleet = edge.fleet
    text = f"{fleet.ready} of {fleet.wanted} devices are ready" + (
        f", {fleet.lost} lost" if fleet.lost else ""
    )
    if edge.refused is not None:
        return Finding("False", "PodsRefused", f"{text}; the API server refuses a pod: {edge.refused}")
    if not fleet.wanted:
        return Finding("False", "NoDevices", "no node has the labels of edge.deviceSelector")
    if fleet.lost == fleet.wanted:
        return Finding("False", "DevicesLost", text)
    if fleet.ready + fleet.lost < fleet.wanted:
        waiting = cloud.endpoint is None or fleet.phases.get(PENDING, 0) > 0 or not edge.updated
        return Finding("False", "WaitingForDevices" if waiting else "DevicesNotReady", text)
    # A device that is switched off is everyday life at the edge: it must not make the whole deployment unready.
    return Finding("True", "DevicesReady", text)


def _metrics(hat: HatDeployment, seen: MetricsSeen) -> Finding:
    if hat.spec.suspend:
        return Finding("Unknown", "Suspended", "spec.suspend is true")
    if hat.spec.cloud.replicas == 0:
        return Finding("Unknown", "ScaledToZero", "spec.cloud.replicas is 0")
    if seen.telling and seen.source:
        return Finding("True", "PrometheusTells", f"{seen.source} tells of cloud and devices")
    if seen.telling:
        return Finding("True", "ReplicasTell", "the cloud's replicas tell of their devices")
    if seen.frozen:
        text = f"no replica of the cloud tells of its devices: {seen.error}"
        if seen.source:
            text = f"{seen.source} tells nothing of cloud and devices: {seen.error}"
        if adaptive(hat.spec.mode, hat.spec.chunking):
            return Finding(
                "False", "PolicyFrozen", f"chunk sizes proposed to devices stay as they are; {text}"
            )
        return Finding("False", "PrometheusSilent" if seen.source else "ReplicasSilent", text)
    if seen.source:
        return Finding("Unknown", "NoReplicaAnswered", f"{seen.source} has told nothing of the cloud yet")
    return Finding(
        "Unknown", "NoReplicaAnswered", "no ready replica of the cloud has told of its devices yet"
    )


def _progressing(hat: HatDeployment, cloud: CloudSeen, edge: EdgeSeen) -> Finding:
    if hat.spec.suspend:
        return Finding("False", "Suspended", "spec.suspend is true")
    if cloud.refused is not None:
        return Finding("True", "PodsRefused", f"the API server refuses replicas: {cloud.refused}")
    if cloud.serving_revision not in (None, cloud.wanted_revision):
        until = "it is ready"
        if cloud.updated and edge.unreachable is not None:
            until = "the devices' cluster answers"
        text = f"revision {cloud.wanted_revision} starts; {cloud.serving_revision} serves until {until}"
        return Finding("True", "NewRevisionStarting", text)
    if not cloud.updated:
        return Finding("True", "CloudRollingOut", "replicas of the cloud are being replaced")
    if hat.spec.edge is not None and not edge.updated:
        return Finding("True", "DevicesRollingOut", "devices are being updated, a tenth of them at a time")
    return Finding("False", "Complete", "everything is as the spec wants it")


def _ready(hat: HatDeployment, found: Mapping[str, Finding]) -> Finding:
    if hat.spec.suspend:
        return Finding("False", "Suspended", "spec.suspend is true")
    for name in _READY_NEEDS:
        finding = found.get(name)
        # Unknown of ModelSplitValid only says that no replica has loaded the model yet, as CloudReady says better.
        if (
            finding is None
            or finding.status == "True"
            or (name == SPLIT_VALID and finding.status == "Unknown")
        ):
            continue
        return Finding("False", finding.reason, f"{name}: {finding.message}")
    return Finding("True", "AllReady", "cloud and devices serve")
