"""Brings one HatDeployment from what is to what is wanted. Level-based: each call looks at everything anew.

A call may be cut off anywhere (the process may be killed): the next one, here or in another process, carries on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hat_operator import devices, events, gauges, names, refusals, rollout, sites, status
from hat_operator.children import Children, key_of
from hat_operator.cluster import Cluster, ClusterError, Object
from hat_operator.deletion import Deletion
from hat_operator.desired import Desired, Observed, cloud_endpoint, desired_objects
from hat_operator.edges import EdgeClusters, EdgeUnreachable, unreachable
from hat_operator.essentials import essentials
from hat_operator.figures import Pace
from hat_operator.identity.authority import Authorities
from hat_operator.identity.service import Identities, Looked
from hat_operator.kinds import CONFIG_MAP, HATDEPLOYMENT, NODE, POD
from hat_operator.objects.replica_files import DENIED
from hat_operator.policy import adaptive
from hat_operator.settings import Settings
from hat_operator.sites import Sites
from hat_operator.slow_loop import SlowLoop
from hat_operator.spec import ClusterRef, Edge, HatDeployment, SpecError
from hat_operator.status import CloudSeen, EdgeSeen, Problem
from hat_operator.telemetry import Telemetry
from hat_operator.watches import EdgeWatches

log = logging.getLogger(__name__)


@dataclass
class _Site:
    """The devices' side during one reconcile."""

    children: Children | None = None
    """None: there are no devices, or they cannot be reached."""
    pods: list[Object] | None = None
    nodes: list[Object] | None = None
    refused: str | None = None
    """Why a device has no pod, where its DaemonSet could not create one."""
    away: Problem | None = None
    problem: Problem | None = None
    """Why pods or nodes are not known, though their cluster answers."""


class Reconciler:
    """Reconciles HatDeployments of the operator's own cluster."""

    def __init__(
        self,
        home: Cluster,
        edges: EdgeClusters,
        settings: Settings,
        telemetry: Telemetry | None = None,
        watches: EdgeWatches | None = None,
        loop: SlowLoop | None = None,
        identities: Identities | None = None,
    ) -> None:
        """Without telemetry devices have no figures, without watches other clusters are polled only.

        Without a loop no chunk sizes are proposed; without identities a new deny-list reaches new pods only.
        """
        self._identities = identities or Identities(home, settings, Authorities(home, settings.trust_domain))
        self._loop = loop
        self._home = home
        self._telemetry = telemetry
        self._pace = Pace()
        self._edges = edges
        self._settings = settings
        self._watches = watches
        self._sites = Sites(home, edges)
        self._deletion = Deletion(home, self._sites)

    async def reconcile(self, namespace: str, name: str) -> float | None:
        """One pass over one HatDeployment.

        Returns:
            Seconds after which to look again; None: at the next event or resync.

        Raises:
            ClusterError: the operator's own cluster refused or did not answer; try again later.
        """
        body = await self._home.get(HATDEPLOYMENT, name, namespace)
        if body is None:
            self._forget(namespace, name)
            return None
        if "deletionTimestamp" in body["metadata"]:
            return await self._deletion.proceed(body)
        try:
            hat = HatDeployment.parse(body)
            completed = await self._complete(body, hat)
            if completed is not body:
                body = completed
                hat = HatDeployment.parse(body)
            if self._telemetry is not None:
                self._telemetry.follow(hat)
            cloud, edge = await self._sides(hat, body)
        except SpecError as error:
            await self._write_invalid(body, str(error))
            await self._guard(body)
            return None
        old = body.get("status", {})
        cloud, edge, again_s = self._with_figures(hat, cloud, edge)
        await self._write_status(body, status.new_status(hat, old, cloud, edge, events.rfc3339()))
        self._pace.written((namespace, name), time.monotonic())
        return again_s

    async def _complete(self, body: Object, hat: HatDeployment) -> Object:
        """Write what the operator adds: version and tls once, and for a second cluster the finalizer and its place.

        Raises:
            SpecError: the API server does not take the object with it.
            ClusterError: the operator's own cluster did not answer.
        """
        change: dict[str, Any] = {}
        # Once, so that the upgrade of the operator does not roll every HatDeployment.
        if not hat.spec.version:
            change["spec"] = {"runtime": {"version": self._settings.version}}
        if not hat.spec.security.tls:
            # One that is older than the field goes on as it was. Only what once ran has a cloud in its status; another
            # status says nothing of its age, for a spec that was never valid has one too.
            old = "cloud" in body.get("status", {})
            tls = "mutual" if self._settings.identities and not old else "off"
            change.setdefault("spec", {})["security"] = {"tls": tls}
        ref = hat.spec.edge_cluster
        if ref is not None:
            meta: dict[str, Any] = {}
            if names.FINALIZER not in hat.finalizers:
                meta["finalizers"] = [*hat.finalizers, names.FINALIZER]
            known = sites.places(body)
            if sites.place_of(ref) not in known:
                meta["annotations"] = sites.annotation([*known, sites.place_of(ref)])
            if meta:
                change["metadata"] = meta
        if not change:
            return body
        change.setdefault("metadata", {})["resourceVersion"] = body["metadata"]["resourceVersion"]
        try:
            return await self._home.patch(body, change)
        except ClusterError as error:
            if error.reason != "Invalid":
                raise
            # As tls: off is with deniedDevices, by an operator that signs nothing.
            raise SpecError("spec", change.get("spec"), f"the operator cannot add it: {error}") from None

    async def _sides(self, hat: HatDeployment, body: Object) -> tuple[CloudSeen, EdgeSeen]:
        cloud, local = await Children.read_home(self._home, hat)
        policy = await self._policy(hat, body, cloud)
        site = await self._read_site(hat, local)
        here = None if site.children is None else site.children.cluster
        looked = await self._identities.look(body, hat, cloud, here, site.nodes)
        wanted = names.revision(hat, self._settings)
        plan = partial(self._plan, hat, cloud, site, wanted, policy, looked)
        desired, seen = plan()
        problem = None
        try:
            await cloud.apply(desired.cloud)
            # The Service knows its node port only now, and a Deployment of no replicas is ready at once.
            before = desired.cloud
            desired, seen = plan()
            if desired.cloud != before:
                await cloud.apply(desired.cloud)
            await cloud.prune(desired.cloud, desired.keeps)
        except ClusterError as error:
            if error.cluster_away:
                raise
            problem = Problem(_problem_reason(error), str(error))
        await self._identities.published(body, hat, looked, cloud)
        return _cloud_seen(cloud, replace(seen, problem=problem)), await self._edge(
            hat, body, desired, local, site
        )

    async def _guard(self, body: Object) -> None:
        """While the spec is invalid: pods that run get certificates, and devices that it names are refused."""
        try:
            hat = essentials(body)
        except SpecError as error:
            log.warning(
                "%s/%s: nothing is signed: %s", body["metadata"]["namespace"], body["metadata"]["name"], error
            )
            return
        if hat.spec.security.tls != "mutual":
            return
        cloud = Children(self._home, (), frozenset())
        site = await self._read_site(hat, cloud)
        here = None if site.children is None else site.children.cluster
        looked = await self._identities.look(body, hat, cloud, here, site.nodes)
        if looked.denied is not None:
            await cloud.apply([DENIED.config_map(hat, looked.denied)])
        await self._identities.published(body, hat, looked, cloud)

    async def _policy(self, hat: HatDeployment, body: Object, cloud: Children) -> str | None:
        """The chunk policy that the ConfigMap should hold. The ConfigMap joins the children, which do not list it."""
        if self._loop is None or not adaptive(hat.spec.mode, hat.spec.chunking):
            return None if self._loop is None else self._loop.stored(body, hat, None)
        try:
            # By name: a right to list would show every ConfigMap.
            live = await self._home.get(CONFIG_MAP, names.cloud_policy(hat), hat.namespace)
        except ClusterError as error:
            if error.reason != "Forbidden":
                raise
            # Rights of an earlier version: pods are told all the same, only a new one starts without a policy.
            log.warning("%s/%s: no chunk policy is kept: %s", hat.namespace, hat.name, error)
            self._loop.stored(body, hat, None)
            return None
        if live is not None:
            cloud.live[key_of(live)] = live
        return self._loop.stored(body, hat, live)

    def _plan(
        self,
        hat: HatDeployment,
        cloud: Children,
        site: _Site,
        wanted: str,
        policy: str | None,
        looked: Looked,
    ) -> tuple[Desired, CloudSeen]:
        deployments = rollout.by_revision(cloud.live.values())
        service = cloud.service(names.cloud(hat))
        if site.pods is not None:
            draining = devices.revisions_in_use(site.pods, site.nodes)
        else:
            # Who cannot be asked may still be talking to any of them.
            draining = frozenset(deployments) if site.away or site.problem else frozenset()
        follow = site.away is None or names.endpoint_per_revision(hat)
        observed = Observed(
            cloud_endpoint=rollout.live_endpoint(hat, service),
            endpoints=rollout.revision_endpoints(hat, cloud.live.values()),
            apis=cloud.apis,
            serving_revision=rollout.serving_revision(wanted, deployments, service, follow),
            edge_apis=frozenset() if site.children is None else site.children.apis,
            draining=draining,
            unavailable=_unavailable(site),
            policy=policy,
            denied=looked.denied,
        )
        endpoint = cloud_endpoint(hat, observed, observed.serving_revision or wanted)
        seen = CloudSeen(wanted, observed.serving_revision, endpoint=endpoint, identities=looked.finding)
        return desired_objects(hat, self._settings, observed), seen

    async def _read_site(self, hat: HatDeployment, local: Children) -> _Site:
        """Where the devices' objects are, and who the devices are."""
        edge = hat.spec.edge
        if edge is None:
            return _Site()
        try:
            if edge.cluster is None:
                gauges.set_certificate_end(hat.namespace, hat.name, None)
                children = local
            else:
                cluster = await self._edge_cluster(hat, edge.cluster)
                children = await self._read_edge(cluster, hat)
            site = _Site(children)
        except EdgeUnreachable as error:
            return _Site(away=Problem(error.reason, str(error)))
        try:
            site.pods = await _list_pods(children.cluster, hat)
            site.nodes = await _list_nodes(children.cluster, edge)
            for daemonset in filter(rollout.daemonset_lacks_pods, children.daemonsets()):
                site.refused = site.refused or await refusals.of_daemonset(children.cluster, daemonset)
        except ClusterError as error:
            away = unreachable(error)
            if away is None:
                # A selector that no node can match, for one: all else goes on, and the condition tells it.
                site.problem = Problem(f"Read{error.reason}", str(error))
            elif edge.cluster is None:
                raise
            else:
                return _Site(away=Problem(away.reason, str(away)))
        return site

    async def _edge_cluster(self, hat: HatDeployment, ref: ClusterRef) -> Cluster:
        """A client for the devices' cluster, which from now on is watched."""
        user = (hat.namespace, hat.name)
        try:
            cluster = await self._edges.get(hat.namespace, ref)
        except EdgeUnreachable:
            if self._watches is not None:
                self._watches.drop(user)
            raise
        gauges.set_certificate_end(*user, self._edges.certificate_end(hat.namespace, ref))
        if self._watches is not None:
            self._watches.use(user, cluster, ref.namespace)
        return cluster

    def _forget(self, namespace: str, name: str) -> None:
        self._pace.forget((namespace, name))
        if self._telemetry is not None:
            self._telemetry.forget(namespace, name)
        if self._loop is not None:
            self._loop.forget(namespace, name)
        self._identities.forget(namespace, name)
        self._sites.forget(namespace, name)
        gauges.forget(namespace, name)
        if self._watches is not None:
            self._watches.drop((namespace, name))

    async def _read_edge(self, cluster: Cluster, hat: HatDeployment) -> Children:
        try:
            return await Children.read_edge(cluster, hat)
        except ClusterError as error:
            if error.reason in ("Unreachable", "Unauthorized", "Forbidden"):
                raise EdgeUnreachable(error.reason, str(error)) from None
            raise EdgeUnreachable("Unreachable", str(error)) from None

    async def _edge(
        self, hat: HatDeployment, body: Object, desired: Desired, local: Children, site: _Site
    ) -> EdgeSeen:
        edge = hat.spec.edge
        if site.children is not local:
            # Devices that were in this cluster before, or no devices any more.
            await local.prune(())
        if edge is None:
            gauges.forget(hat.namespace, hat.name)
            return EdgeSeen()
        if site.children is None:
            return EdgeSeen(unreachable=site.away)
        problem = site.problem
        try:
            await site.children.apply(desired.edge)
            await site.children.prune(desired.edge, desired.keeps)
        except ClusterError as error:
            away = unreachable(error)
            if away is not None and edge.cluster is not None:
                return EdgeSeen(unreachable=Problem(away.reason, str(away)))
            if away is not None:
                raise
            problem = problem or Problem(_problem_reason(error), str(error))
        await self._sites.settle(body, hat, site.children.cluster)
        updated = all(rollout.daemonset_done(obj) for obj in site.children.daemonsets())
        fleet = None
        if site.pods is not None and site.problem is None:
            rows = body.get("status", {}).get("devices", ())
            fleet = devices.fleet(site.pods, site.nodes, rows, events.rfc3339())
            gauges.set_devices(hat.namespace, hat.name, fleet.phases)
        return EdgeSeen(fleet, updated, problem=problem, refused=site.refused)

    def _with_figures(
        self, hat: HatDeployment, cloud: CloudSeen, edge: EdgeSeen
    ) -> tuple[CloudSeen, EdgeSeen, float | None]:
        """The devices' figures as they may be written now, and after how many seconds others may be."""
        if self._telemetry is None:
            return cloud, edge, None
        key = hat.namespace, hat.name
        cloud = replace(cloud, metrics=self._telemetry.seen(*key))
        if edge.fleet is None:
            return cloud, edge, None
        figures = self._telemetry.figures(*key)
        rows, again_s = self._pace.rows(key, edge.fleet.rows, figures, time.monotonic())
        return cloud, replace(edge, fleet=replace(edge.fleet, rows=rows)), again_s

    async def _write_invalid(self, body: Object, message: str) -> None:
        old, now = body.get("status", {}), events.rfc3339()
        generation = body["metadata"].get("generation", 0)
        kept = {key: value for key, value in old.items() if key != "conditions"}
        found = status.conditions(status.invalid(message), old.get("conditions", ()), generation, now)
        await self._write_status(body, {**kept, "conditions": found, "observedGeneration": generation})

    async def _write_status(self, body: Object, new: Mapping[str, Any]) -> None:
        old = body.get("status", {})
        change = status.merge_patch(old, new)
        if not change:
            return
        await self._home.patch(body, {"status": change}, "status")
        for kind, reason, message in status.changes(old.get("conditions", ()), new["conditions"]):
            await events.post(self._home, body, kind, reason, message)


def _cloud_seen(cloud: Children, seen: CloudSeen) -> CloudSeen:
    deployments = rollout.by_revision(cloud.live.values())
    wanted = deployments.get(seen.wanted_revision)
    serving = deployments.get(seen.serving_revision or seen.wanted_revision)
    return replace(
        seen,
        replicas=0 if serving is None else int(serving.get("status", {}).get("replicas") or 0),
        ready=rollout.ready_replicas(serving),
        updated=wanted is not None and rollout.deployment_done(wanted),
        refused=refusals.of_deployment(wanted),
    )


def _unavailable(site: _Site) -> dict[str, int]:
    if site.children is None or site.pods is None:
        return {}
    return devices.unavailable(site.children.daemonsets(), site.pods, site.nodes)


def _problem_reason(error: ClusterError) -> str:
    return "NameConflict" if error.reason == "NameConflict" else f"Apply{error.reason}"


async def _list_pods(cluster: Cluster, hat: HatDeployment) -> list[Object] | None:
    selector = names.selector_text(names.selector(hat, names.EDGE))
    return await _list_allowed(cluster.list(POD, names.edge_namespace(hat), selector))


async def _list_nodes(cluster: Cluster, edge: Edge) -> list[Object] | None:
    return await _list_allowed(cluster.list(NODE, None, names.selector_text(edge.match_labels)))


async def _list_allowed(listing: Awaitable[list[Object]]) -> list[Object] | None:
    """The list, None if the operator may not read these objects."""
    try:
        return await listing
    except ClusterError as error:
        if error.reason == "Forbidden":
            return None
        raise
