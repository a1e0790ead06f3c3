"""What should exist for a HatDeployment: a pure function of its spec and of a few facts seen in the clusters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hat_operator import names

POD_MONITOR_API = "monitoring.coreos.com/v1/PodMonitor"


@dataclass(frozen=True)
class Observed:
    """What the desired state depends on besides the spec."""

    cloud_endpoint: str | None = None
    """HOST:PORT of the live Service, where names.fixed_endpoint is None."""
    apis: frozenset[str] = frozenset()
    """GROUP/VERSION/KIND of optional APIs of the cloud's cluster."""
    serving_revision: str | None = None
    """The revision whose Deployment is ready; None if none is."""
    edge_apis: frozenset[str] = frozenset()
    """As `apis`, of the devices' cluster, where it is another one."""
    draining: frozenset[str] = frozenset()
    """Older revisions that devices still use; their Deployments stay."""


@dataclass(frozen=True)
class Desired:
    """Objects to apply, in order. What is neither here nor kept is to be deleted."""

    cloud: list[dict[str, Any]]
    edge: list[dict[str, Any]]
    keep_revisions: frozenset[str] = field(default_factory=frozenset)
    """Revisions whose Deployments stay as they are: the spec that they were made from is gone."""
    keep_daemonsets: bool = False
    """The DaemonSets stay as they are: they belong to the serving revision, or there is no endpoint for new ones yet."""

    def keeps(self, live: Mapping[str, Any]) -> bool:
        """Whether a live object of this HatDeployment that is not among the desired ones must stay."""
        if live["kind"] == "DaemonSet":
            return self.keep_daemonsets
        revision = live["metadata"].get("labels", {}).get(names.LABEL_REVISION)
        return live["kind"] == "Deployment" and revision in self.keep_revisions
