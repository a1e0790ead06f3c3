"""HatDeployments that tests start from, and changes to them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

GROUP, VERSION, PLURAL = "hat.dev", "v1alpha1", "hatdeployments"
REMOVED = object()
QUOTAS: dict[str, Any] = {
    "deviceDefault": {"sessions": 4, "tokensPerSecond": 200.5, "burstTokens": 1000, "kvShare": 0.25},
    "devices": [
        {"name": "jetson-1", "unlimited": ["sessions", "tokensPerSecond", "kvShare"]},
        {"name": "jetson-2.site_a", "burstTokens": 1, "kvShare": 0.000001},
    ],
    "tenantDefault": {"sessions": 0, "tokensPerSecond": 1000000000, "weight": 0.01},
    "tenants": [{"name": "acme", "sessions": 1048576, "burstTokens": 1, "weight": 100}],
}
"""Every field of spec.cloud.quotas, many at a bound."""


def hat_deployment(name: str = "chat", **spec: Any) -> dict[str, Any]:
    """The shortest valid HatDeployment; `spec` adds or replaces top-level fields of its spec."""
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "HatDeployment",
        "metadata": {"name": name},
        "spec": {"model": {"source": {"hub": "default"}}, "split": {"inputLayers": 3}, **spec},
    }


def two_clusters(name: str = "chat") -> dict[str, Any]:
    """Devices in a second cluster, two kinds of them, with weights from claims on both sides."""
    edge = {
        "clusterRef": {"kubeconfigSecretRef": {"name": "site"}, "namespace": "devices"},
        "deviceSelector": {"matchLabels": {"hat.dev/device": "true"}},
        "images": [{"name": "orin", "l4t": "r36.4"}, {"name": "pc", "arch": "amd64"}],
        "weights": {"claim": {"name": "part"}},
    }
    return changed(
        hat_deployment(name, edge=edge),
        {
            "spec.model.source": {"claim": {"name": "weights"}},
            "spec.cloud.expose": {"type": "NodePort", "host": "cloud.example.com"},
        },
    )


def token_mode(name: str = "chat") -> dict[str, Any]:
    """The shortest HatDeployment with mode: picospec and devices."""
    edge = {"deviceSelector": {"matchLabels": {"hat.dev/device": "true"}}}
    return changed(hat_deployment(name, mode="picospec", edge=edge), {"spec.split": REMOVED})


def changed(body: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `body` with values at dotted paths replaced, or removed where the value is REMOVED.

    Numbers index lists; missing objects on the way are made.
    """
    result = copy.deepcopy(dict(body))
    for path, value in changes.items():
        *way, last = path.split(".")
        place: Any = result
        for step in way:
            place = place[int(step)] if isinstance(place, list) else place.setdefault(step, {})
        if value is REMOVED:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = copy.deepcopy(value)
    return result
