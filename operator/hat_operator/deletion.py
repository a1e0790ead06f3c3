"""What the deletion of a HatDeployment with devices in another cluster waits for."""

from __future__ import annotations

import calendar
import time

from hat_operator import events, names
from hat_operator.cluster import Cluster, ClusterError, Object
from hat_operator.edges import EdgeUnreachable
from hat_operator.essentials import essentials
from hat_operator.sites import LEFT_BEHIND, Sites
from hat_operator.spec import SpecError

RETRY_S = 5.0
DEFAULT_TIMEOUT_S = 300


class Deletion:
    """Removes the devices' objects and then the finalizer; in the own cluster owner references do the work."""

    def __init__(self, home: Cluster, sites: Sites) -> None:
        self._home = home
        self._sites = sites

    async def proceed(self, body: Object) -> float | None:
        """One pass over a HatDeployment that is being deleted.

        Returns:
            Seconds after which to try again; None: nothing is left to do.

        Raises:
            ClusterError: the operator's own cluster refused or did not answer.
        """
        finalizers = body["metadata"].get("finalizers", [])
        if names.FINALIZER not in finalizers:
            return None
        timeout_s = DEFAULT_TIMEOUT_S
        try:
            hat = essentials(body)
            if hat.spec.edge is not None:
                timeout_s = hat.spec.edge.deletion_timeout_s
            await self._sites.clean(body, hat)
        except (SpecError, EdgeUnreachable) as error:
            left = _deleted_at(body) + timeout_s - time.time()
            if left > 0:
                return min(RETRY_S, left)
            text = f"gave up after {timeout_s} s; what the operator made in the devices' cluster stays there: {error}"
            await events.post(self._home, body, "Warning", LEFT_BEHIND, text)
        change = {
            "finalizers": [finalizer for finalizer in finalizers if finalizer != names.FINALIZER],
            "resourceVersion": body["metadata"]["resourceVersion"],
        }
        try:
            await self._home.patch(body, {"metadata": change})
        except ClusterError as error:
            if error.reason != "NotFound":
                raise
        return None


def _deleted_at(body: Object) -> float:
    return float(calendar.timegm(time.strptime(body["metadata"]["deletionTimestamp"], "%Y-%m-%dT%H:%M:%SZ")))
