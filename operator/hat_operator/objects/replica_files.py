"""Files that a HatDeployment's replicas read from ConfigMaps.

A pod's template names such a ConfigMap but not its content, so that other content replaces no pod.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hat_operator import names
from hat_operator.spec import HatDeployment


@dataclass(frozen=True)
class ReplicaFile:
    """One such file, and the ConfigMap, volume and mount that bring it to the cloud's container."""

    name: str
    """Of the volume; the folder and the file are called after it."""
    map_name: Callable[[HatDeployment], str]
    """Name of the ConfigMap."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the volume's source."""

    @property
    def key(self) -> str:
        """Of the file in the ConfigMap."""
        return f"{self.name}.json"

    @property
    def path(self) -> str:
        """Where the container finds it."""
        return f"/{self.name}/{self.key}"

    def config_map(self, hat: HatDeployment, data: Mapping[str, str]) -> dict[str, Any]:
        """The ConfigMap; `data` holds the file under `key`."""
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": names.metadata(hat, names.CLOUD, self.map_name(hat), hat.namespace),
            "data": dict(data),
        }

    def volume(self, hat: HatDeployment) -> dict[str, Any]:
        """Of the cloud's pods."""
        return {"name": self.name, "configMap": {"name": self.map_name(hat), **self.source}}

    def mount(self) -> dict[str, Any]:
        """Where the container sees it; the folder as a whole, since a single file would never change."""
        return {"name": self.name, "mountPath": f"/{self.name}", "readOnly": True}


POLICY = ReplicaFile("policy", names.cloud_policy, {"optional": True})
"""The chunk policy that a replica starts with, if it is there; the one in effect is pushed."""
DENIED = ReplicaFile("denied", names.cloud_denied, {"items": [{"key": "denied.json", "path": "denied.json"}]})
"""The deny-list that a replica starts with; the one in effect is pushed.

The ConfigMap also holds what the operator knows of who left the fleet. A replica does not start without it: it would
let everybody in.
"""
QUOTAS = ReplicaFile("quotas", names.cloud_quotas)
"""The quota file that replicas follow: the kubelet brings a change into the pods that run, which read it again.

A replica does not start without it: it would limit nobody. Only where the spec has quotas is it mounted. Mounted
always, a new operator would restart every cloud, and images from before --quotas would not start.
"""
