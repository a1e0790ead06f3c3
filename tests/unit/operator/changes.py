"""A changed value for every field of a HatDeployment's spec. A test holds this and the CRD together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.unit.operator.samples import HUB, REMOTE

FAR = {"clusterRef": REMOTE}
BALANCED: dict[str, Any] = {"expose": {"type": "LoadBalancer"}}
CLAIM = {"claim": {"name": "c"}}
RATED = {"cloud": {"quotas": {f"{kind}Default": {"tokensPerSecond": 1} for kind in ("tenant", "device")}}}
WEIGHTS = {"weights": {"claim": {"name": "w"}}}


def picospec(**draft_model: Any) -> dict[str, Any]:
    """Around a field of mode picospec; None is a field of the smallest spec that is left out."""
    model = {"source": {"hub": "default"}}
    return {"mode": "picospec", "split": None, "model": model, "speculation": {"draftModel": draft_model}}


# One changed value for every field of the spec, and what it takes around it.
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "suspend": (True, {}),
    "model.source.hub": ("org/other", {}),
    "model.source.claim.name": ("d", {"model": {"source": CLAIM}, "edge": WEIGHTS}),
    "model.source.claim.path": ("sub", {"model": {"source": CLAIM}, "edge": WEIGHTS}),
    "model.tokenSecretRef.name": ("other", {"model": {"source": HUB, "tokenSecretRef": {"name": "t"}}}),
    "model.tokenSecretRef.key": ("other", {"model": {"source": HUB, "tokenSecretRef": {"name": "t"}}}),
    "model.revision": ("v2", {}),
    "model.dtype": ("float32", {}),
    "split.inputLayers": (4, {}),
    "runtime.version": ("2", {}),
    "cloud.replicas": (2, {}),
    "cloud.accelerator.type": (
        "none",
        {"cloud": {"accelerator": {"type": "nvidia.com/gpu", "count": 1}}},
    ),
    "cloud.resources.requests": ({"cpu": "3"}, {}),
    "cloud.resources.limits": ({"cpu": "3"}, {}),
    "cloud.maxSessions": (5, {}),
    "cloud.resumeTtlSeconds": (5, {}),
    "cloud.runtimeClassName": ("kata-qemu-nvidia-gpu-snp", {}),
    "cloud.quotas.deviceDefault.sessions": (3, {}),
    "cloud.quotas.deviceDefault.tokensPerSecond": (3, {}),
    "cloud.quotas.deviceDefault.burstTokens": (3, RATED),
    "cloud.quotas.deviceDefault.kvShare": (0.5, {}),
    "cloud.quotas.devices": ([{"name": "jetson-1", "unlimited": ["sessions"]}], {}),
    "cloud.quotas.tenantDefault.sessions": (3, {}),
    "cloud.quotas.tenantDefault.tokensPerSecond": (3, {}),
    "cloud.quotas.tenantDefault.burstTokens": (3, RATED),
    "cloud.quotas.tenantDefault.kvShare": (0.5, {}),
    "cloud.quotas.tenantDefault.weight": (3, {}),
    "cloud.quotas.tenants": ([{"name": "acme", "weight": 2}], {}),
    "cloud.image": ("mine:1", {}),
    "cloud.expose.type": ("LoadBalancer", {}),
    "cloud.expose.host": ("h", {}),
    "cloud.expose.port": (9000, {}),
    "cloud.expose.nodePort": (
        30071,
        {"cloud": {"expose": {"type": "NodePort", "host": "h", "nodePort": 30070}}},
    ),
    "cloud.template.nodeSelector": ({"a": "b"}, {}),
    "cloud.template.tolerations": ([{"operator": "Exists"}], {}),
    "cloud.template.labels": ({"a": "b"}, {}),
    "cloud.template.annotations": ({"a": "b"}, {}),
    "cloud.template.priorityClassName": ("p", {}),
    "edge.clusterRef.namespace": ("other", {"edge": FAR, "cloud": BALANCED}),
    "edge.deviceSelector.matchLabels": ({"a": "b"}, {}),
    "edge.images": ([{"name": "x", "l4t": "", "arch": "arm64", "image": ""}], {}),
    "edge.runtimeClassName": ("nvidia", {}),
    "edge.accelerator.type": ("cuda", {}),
    "edge.resources.requests": ({"cpu": "3"}, {}),
    "edge.resources.limits": ({"cpu": "3"}, {}),
    "edge.api.port": (80, {}),
    "edge.api.hostPort": (80, {}),
    "edge.api.modelName": ("m", {}),
    "edge.api.keySecretRef.name": ("other", {"edge": {"api": {"keySecretRef": {"name": "k"}}}}),
    "edge.api.keySecretRef.key": ("other", {"edge": {"api": {"keySecretRef": {"name": "k"}}}}),
    "edge.weights.claim.name": ("v", {"edge": WEIGHTS}),
    "edge.weights.claim.path": ("sub", {"edge": WEIGHTS}),
    "edge.template.nodeSelector": ({"a": "b"}, {}),
    "edge.template.tolerations": ([{"operator": "Exists"}], {}),
    "edge.template.labels": ({"a": "b"}, {}),
    "edge.template.annotations": ({"a": "b"}, {}),
    "edge.template.priorityClassName": ("p", {}),
    "edge.offline": ("draft-only", picospec(hub="org/small")),
    "speculation.draftModel.hub": ("org/other", picospec(hub="org/small")),
    "speculation.draftModel.claim.name": ("other", picospec(claim={"name": "c"})),
    "speculation.draftModel.claim.path": ("sub", picospec(claim={"name": "c"})),
    "speculation.drafter": ("none", {}),
    "speculation.maxDraft": (3, {}),
    "speculation.stopThreshold": (0.5, {}),
    "speculation.window": (2, {}),
    "speculation.branches": (2, {}),
    "speculation.alternatives": (2, {}),
    "speculation.sampler": ("rejection", {}),
    "chunking.mode": ("balance", {}),
    "chunking.minTokens": (32, {}),
    "chunking.maxTokens": (256, {}),
    "chunking.tokens": (0, {"chunking": {"mode": "fixed"}}),
    "wire.uplink": ("int8", {}),
    "wire.uplinkDecode": ("bf16", {}),
    "wire.padFrames": (True, {}),
    "imagePullSecrets": ([{"name": "s"}], {}),
    "security.networkPolicies": (False, {}),
    "security.tls": ("off", {}),
    "observability.logLevel": ("debug", {}),
    "observability.podMonitor": ("enabled", {}),
}
WITHOUT_OBJECTS = {
    "mode": "changes together with split",
    "cloud.tensorParallel": "one value in this version",
    "cloud.accelerator.count": "follows from type: 0 or 1",
    "edge.clusterRef.kubeconfigSecretRef.name": "says where objects are sent, not what they are",
    "edge.clusterRef.kubeconfigSecretRef.key": "says where objects are sent, not what they are",
    "edge.clusterRef.kubeconfigSecretRef.context": "says where objects are sent, not what they are",
    "edge.deletionTimeoutSeconds": "is about deletion",
    "observability.prometheusUrl": "says whom the operator asks",
    "observability.prometheusTokenSecretRef.name": "says whom the operator asks",
    "observability.prometheusTokenSecretRef.key": "says whom the operator asks",
    "observability.prometheusCaRef.kind": "says whom the operator asks",
    "observability.prometheusCaRef.name": "says whom the operator asks",
    "observability.prometheusCaRef.key": "says whom the operator asks",
    "wire.downlink": "one value in this version",
    "security.certificateHours": "is the signer's",
    "security.deniedDevices": "is in the deny-list, which is observed",
}


def leaves(schema: dict[str, Any], path: str = "") -> Iterator[str]:
    if "properties" not in schema:
        yield path
    for key, below in schema.get("properties", {}).items():
        yield from leaves(below, f"{path}.{key}".lstrip("."))
