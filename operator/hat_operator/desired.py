"""What should exist for a HatDeployment: a pure function of its spec and of a few facts seen in the clusters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hat_operator import names
from hat_operator.objects import cloud, edge, monitor, policies
from hat_operator.objects.replica_files import DENIED, POLICY, QUOTAS
from hat_operator.rollout import revision_of
from hat_operator.settings import Settings
from hat_operator.spec import HatDeployment


@dataclass(frozen=True)
class Observed:
    """What the desired state depends on besides the spec."""

    cloud_endpoint: str | None = None
    """HOST:PORT of the live Service, where names.fixed_endpoint is None and all revisions share it."""
    endpoints: Mapping[str, str] = field(default_factory=dict)
    """HOST:PORT of each revision's live Service, where names.endpoint_per_revision."""
    apis: frozenset[str] = frozenset()
    """GROUP/VERSION/KIND of optional APIs of the cloud's cluster."""
    serving_revision: str | None = None
    """The revision that devices are led to (rollout.serving_revision); None: there is none to keep."""
    edge_apis: frozenset[str] = frozenset()
    """As `apis`, of the devices' cluster, where it is another one."""
    draining: frozenset[str] = frozenset()
    """Older revisions that devices still use; their Deployments stay."""
    unavailable: Mapping[str, int] = field(default_factory=dict)
    """How many devices of a DaemonSet, by its name, may be without a ready pod while it is updated; absent: a tenth."""
    policy: str | None = None
    """The chunk policy, in JSON, that replicas should start with; None: there is none to keep."""
    denied: Mapping[str, str] | None = None
    """What the ConfigMap with the deny-list should hold; None: there is none to keep."""


@dataclass(frozen=True)
class Desired:
    """Objects to apply, in order. What is neither here nor kept is to be deleted."""

    cloud: list[dict[str, Any]]
    edge: list[dict[str, Any]]
    keep_revisions: frozenset[str] = field(default_factory=frozenset)
    """Revisions whose Deployments and Services stay as they are: the spec that they were made from is gone."""
    keep_daemonsets: bool = False
    """The DaemonSets stay as they are: of the serving revision, or without an endpoint for new ones yet."""

    def keeps(self, live: Mapping[str, Any]) -> bool:
        """Whether a live object of this HatDeployment that is not among the desired ones must stay."""
        if live["kind"] == "DaemonSet":
            return self.keep_daemonsets
        return live["kind"] in ("Deployment", "Service") and revision_of(live) in self.keep_revisions


def desired_objects(hat: HatDeployment, settings: Settings, observed: Observed) -> Desired:
    """All objects of both sides.

    A new revision is blue/green: its Deployment and Service start beside the serving ones, and DaemonSets follow only
    when `observed.serving_revision` is the new one. Those of `observed.draining` stay until devices have moved.

    Raises:
        SpecError: a quantity in the spec is none.
    """
    wanted = names.revision(hat, settings)
    serving = wanted if hat.spec.suspend else observed.serving_revision or wanted
    kept = frozenset() if hat.spec.suspend else (observed.draining | {serving}) - {wanted}
    return Desired(
        cloud=_cloud(hat, settings, observed, wanted, serving, kept),
        edge=_edge(hat, settings, observed, wanted, serving, kept),
        keep_revisions=kept,
        keep_daemonsets=_keeps_daemonsets(hat, observed, wanted, serving),
    )


def cloud_endpoint(hat: HatDeployment, observed: Observed, revision: str) -> str | None:
    """HOST:PORT that devices of a revision dial, None while no one knows."""
    if names.endpoint_per_revision(hat):
        return names.fixed_endpoint(hat, revision) or observed.endpoints.get(revision)
    return names.fixed_endpoint(hat, revision) or observed.cloud_endpoint


def _cloud(
    hat: HatDeployment,
    settings: Settings,
    observed: Observed,
    wanted: str,
    serving: str,
    kept: frozenset[str],
) -> list[dict[str, Any]]:
    name, namespace = names.cloud(hat), hat.namespace
    found = [cloud.service_account(hat, names.CLOUD, name, namespace)]
    if hat.spec.security.network_policies:
        found.append(policies.cloud(hat, settings))
    found.append(cloud.service(hat, serving))
    if names.endpoint_per_revision(hat):
        # One that is there stays as it is, with the port that its devices know.
        missing = sorted(kept - observed.endpoints.keys())
        found += [cloud.revision_service(hat, revision) for revision in (*missing, wanted)]
    found.append(cloud.disruption_budget(hat))
    if observed.policy is not None:
        found.append(POLICY.config_map(hat, {POLICY.key: observed.policy}))
    if observed.denied is not None:
        found.append(DENIED.config_map(hat, observed.denied))
    if hat.spec.cloud.quotas is not None:
        found.append(QUOTAS.config_map(hat, {QUOTAS.key: hat.spec.cloud.quotas}))
    found.append(cloud.deployment(hat, settings, wanted))
    if monitor.wanted(hat, observed.apis):
        found.append(monitor.pod_monitor(hat, names.CLOUD, name, namespace))
    return found


def _edge(
    hat: HatDeployment,
    settings: Settings,
    observed: Observed,
    wanted: str,
    serving: str,
    kept: frozenset[str],
) -> list[dict[str, Any]]:
    spec = hat.spec.edge
    if spec is None:
        return []
    name, namespace = names.edge(hat), names.edge_namespace(hat)
    endpoint = cloud_endpoint(hat, observed, wanted)
    found = [cloud.service_account(hat, names.EDGE, name, namespace)]
    if hat.spec.security.network_policies:
        dialled = {endpoint, *(observed.endpoints.get(revision) for revision in kept)}
        found.append(policies.edge(hat, settings, sorted(filter(None, dialled))))
    found.append(edge.service(hat, spec))
    if endpoint is not None and serving == wanted and not hat.spec.suspend:
        found += edge.daemonsets(hat, spec, settings, wanted, endpoint, observed.unavailable)
    if monitor.wanted(hat, observed.apis if spec.cluster is None else observed.edge_apis):
        found.append(monitor.pod_monitor(hat, names.EDGE, name, namespace))
    return found


def _keeps_daemonsets(hat: HatDeployment, observed: Observed, wanted: str, serving: str) -> bool:
    if hat.spec.suspend or hat.spec.edge is None:
        return False
    return serving != wanted or cloud_endpoint(hat, observed, wanted) is None
