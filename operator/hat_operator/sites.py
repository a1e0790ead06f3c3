"""Where a HatDeployment's devices were before: what the operator made there has to go when they are elsewhere.

An annotation lists every place that may hold objects, before anything is made there, so that a process that is killed
leaves no orphans. What a kubeconfig Secret held before it was replaced is known to the running process only.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hat_operator import events, names
from hat_operator.children import Children
from hat_operator.cluster import Cluster, ClusterError, Object
from hat_operator.edges import EdgeClusters, EdgeUnreachable
from hat_operator.spec import ClusterRef, HatDeployment, SecretKey

log = logging.getLogger(__name__)
User = tuple[str, str]
RETRY_S = 60.0
"""Between two tries to clean up a place that does not answer: each may cost a timeout."""
ANNOTATION = f"{names.GROUP}/edge-sites"
LEFT_BEHIND = "EdgeObjectsLeftBehind"


@dataclass(frozen=True)
class Place:
    """The cluster behind a kubeconfig Secret; its namespace never changes."""

    secret: str
    key: str
    context: str


def place_of(ref: ClusterRef) -> Place:
    """The place that a spec names."""
    return Place(ref.kubeconfig.name, ref.kubeconfig.key, ref.context)


def places(body: Mapping[str, Any]) -> list[Place]:
    """All that a HatDeployment's annotation lists; what is not readable there is skipped."""
    text = body["metadata"].get("annotations", {}).get(ANNOTATION, "[]")
    try:
        return [Place(**{key: str(value) for key, value in item.items()}) for item in json.loads(text)]
    except (ValueError, TypeError, AttributeError):
        log.warning("annotation %s: %r is not readable", ANNOTATION, text)
        return []


def annotation(found: Iterable[Place]) -> dict[str, str]:
    """The annotation, for metadata.annotations."""
    return {ANNOTATION: json.dumps([asdict(place) for place in found], separators=(",", ":"))}


class Sites:
    """Removes what is left in places where the devices are no more."""

    def __init__(self, home: Cluster, edges: EdgeClusters) -> None:
        self._home = home
        self._edges = edges
        self._last: dict[User, Cluster] = {}
        self._again: dict[tuple[User, Place], float] = {}

    async def settle(self, body: Object, hat: HatDeployment, here: Cluster) -> None:
        """The devices' objects are `here` now: clean up everywhere else.

        Raises:
            ClusterError: the operator's own cluster did not answer.
        """
        ref, user = hat.spec.edge_cluster, (hat.namespace, hat.name)
        if ref is None:
            return
        before = self._last.get(user, here)
        self._last[user] = here
        if before.configuration.host != here.configuration.host:
            await self._leave_replaced(body, hat, before, here)
        keep, known = [place_of(ref)], places(body)
        for place in known:
            if place not in keep and not await self._leave(body, hat, place, here):
                keep.append(place)
        if set(keep) != set(known):
            await self._home.patch(body, {"metadata": {"annotations": annotation(keep)}})

    async def clean(self, body: Object, hat: HatDeployment) -> None:
        """Remove the devices' objects from all places.

        Raises:
            EdgeUnreachable: one of the places cannot be asked; the others are clean.
            ClusterError: the operator's own cluster did not answer.
        """
        ref = hat.spec.edge_cluster
        named = [] if ref is None else [place_of(ref)]
        failure: EdgeUnreachable | None = None
        for place in dict.fromkeys((*named, *places(body))):
            try:
                await _prune(await self._cluster(hat, place), hat, None)
            except EdgeUnreachable as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def forget(self, namespace: str, name: str) -> None:
        """The HatDeployment is gone."""
        user = (namespace, name)
        self._last.pop(user, None)
        self._again = {key: at for key, at in self._again.items() if key[0] != user}

    async def _cluster(self, hat: HatDeployment, place: Place) -> Cluster:
        ref = ClusterRef(SecretKey(place.secret, place.key), place.context, names.edge_namespace(hat))
        return await self._edges.get(hat.namespace, ref)

    async def _leave_replaced(self, body: Object, hat: HatDeployment, before: Cluster, here: Cluster) -> None:
        try:
            await _prune(before, hat, here)
        except EdgeUnreachable as error:
            old, new = before.configuration.host, here.configuration.host
            text = f"the devices' cluster was {old} and is {new}; what was made in the first may stay there: {error}"
            await events.post(self._home, body, "Warning", LEFT_BEHIND, text)

    async def _leave(self, body: Object, hat: HatDeployment, place: Place, here: Cluster) -> bool:
        """Whether nothing more is to be done about a place."""
        due = ((hat.namespace, hat.name), place)
        if time.monotonic() < self._again.get(due, 0.0):
            return False
        try:
            await _prune(await self._cluster(hat, place), hat, here)
        except EdgeUnreachable as error:
            if error.reason != "SecretNotFound":
                log.warning("%s/%s: devices were at %s: %s", hat.namespace, hat.name, place, error)
                self._again[due] = time.monotonic() + RETRY_S
                return False
            text = f"what was made in the devices' cluster before may stay there: {error}"
            await events.post(self._home, body, "Warning", LEFT_BEHIND, text)
        self._again.pop(due, None)
        return True


async def _prune(cluster: Cluster, hat: HatDeployment, here: Cluster | None) -> None:
    """Delete a HatDeployment's objects in a cluster, but not those that are also seen `here`.

    Two kubeconfigs may lead to one cluster, so uids decide. The list of what stays is read after the one of what may
    go: what is in the first only was deleted meanwhile, or is elsewhere.
    """
    try:
        children = await Children.read_edge(cluster, hat)
        staying: set[str] = set()
        if here is not None:
            now = await Children.read_edge(here, hat)
            staying = {obj["metadata"]["uid"] for obj in now.live.values()}
        await children.prune((), lambda obj: obj["metadata"]["uid"] in staying)
    except ClusterError as error:
        raise EdgeUnreachable(error.reason, str(error)) from None
