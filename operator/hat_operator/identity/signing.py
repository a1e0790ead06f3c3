"""Approves and signs what the pods of HatDeployments ask for, and denies what they may not have.

Level-based: each call looks at all open requests of one side. One that was cut off between approval and certificate is
checked again and signed by the next.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from hat_operator import events, metrics, names
from hat_operator.cluster import Cluster, ClusterError, Object
from hat_operator.identity import who
from hat_operator.identity.authority import Authorities, Signing, pem
from hat_operator.identity.checks import Granted, Refused, Side, check
from hat_operator.kinds import CERTIFICATE_REQUEST, NODE, POD
from hat_operator.settings import Settings
from hat_operator.spec import HatDeployment
from hat_runtime.security.pki import SKEW

log = logging.getLogger(__name__)
APPROVED, DENIED, FAILED = "Approved", "Denied", "Failed"
REFUSED = "CertificateRefused"
"""Reason of the event, and of a request's condition."""
_MESSAGE_MAX = 1000


class Signer:
    """Signs for all HatDeployments."""

    def __init__(self, home: Cluster, authorities: Authorities, settings: Settings) -> None:
        self._home = home
        self._authorities = authorities
        self._settings = settings

    async def serve(self, body: Object, hat: HatDeployment, cluster: Cluster, component: str) -> None:
        """Answer the open requests of one side's pods, in the cluster where they are.

        Raises:
            AuthorityError: the namespace's authority cannot be used.
            ClusterError: a request failed; the other ones have been answered, unless the cluster is away.
        """
        kind = who.KINDS[component]
        labels = names.selector_text(names.selector(hat, component))
        listed = await cluster.list(
            CERTIFICATE_REQUEST, None, labels, fields=f"spec.signerName={who.signer(kind)}"
        )
        waiting = [request for request in listed if _is_open(request)]
        if not waiting:
            return
        signing = await self._authorities.get(hat.namespace)
        side = await _look(cluster, hat, component)
        failure: ClusterError | None = None
        for request in waiting:
            try:
                await self._answer(body, cluster, request, side, signing)
            except ClusterError as error:
                if error.cluster_away:
                    raise
                # Another operator, or a person, was faster; or this one request cannot be written.
                failure = failure if error.reason in ("Conflict", "NotFound") else failure or error
        if failure is not None:
            raise failure

    async def _answer(
        self, body: Object, cluster: Cluster, request: Object, side: Side, signing: Signing
    ) -> None:
        kind = who.KINDS[side.component]
        try:
            granted = check(request, side, self._settings)
        except Refused as error:
            metrics.CERTIFICATES_REFUSED.labels(kind).inc()
            await _deny(cluster, request, str(error))
            text = f"{request['metadata']['name']}: {error}"
            await events.post(self._home, body, "Warning", REFUSED, text)
            return
        if not _has(request, APPROVED):
            request = await _condition(
                cluster, request, APPROVED, "HatIdentity", f"is {granted.identity}", "approval"
            )
        content = self._certificate(request, side.hat, granted, signing)
        change = {"status": {"certificate": base64.b64encode(content).decode()}}
        await cluster.patch(request, change, "status")
        metrics.CERTIFICATES_SIGNED.labels(kind).inc()
        log.info("%s is signed: %s", request["metadata"]["name"], granted.identity)

    def _certificate(self, request: Object, hat: HatDeployment, granted: Granted, signing: Signing) -> bytes:
        """PEM: the certificate, intermediate authorities, and whom to trust."""
        asked = request["spec"].get("expirationSeconds", self._settings.certificate_s)
        life = min(asked, self._settings.certificate_s, hat.spec.security.certificate_hours * 3600)
        now = datetime.now(UTC)
        made = signing.authority.certify(
            granted.identity, granted.key, now - SKEW, now + timedelta(seconds=life)
        )
        return pem(made) + signing.after


async def _look(cluster: Cluster, hat: HatDeployment, component: str) -> Side:
    """The pods and nodes as they are now: after the requests were listed, whose pods were there before."""
    namespace = hat.namespace if component == names.CLOUD else names.edge_namespace(hat)
    pods = await cluster.list(POD, namespace, names.selector_text(names.selector(hat, component)))
    nodes: frozenset[str] | None = None
    if component == names.EDGE and hat.spec.edge is not None:
        try:
            chosen = await cluster.list(NODE, None, names.selector_text(hat.spec.edge.match_labels))
            nodes = frozenset(node["metadata"]["name"] for node in chosen)
        except ClusterError as error:
            if error.reason != "Forbidden":
                raise
    return Side(hat, component, pods, nodes)


def _is_open(request: Object) -> bool:
    """Whether a request waits for a certificate."""
    if request.get("status", {}).get("certificate"):
        return False
    return not _has(request, DENIED) and not _has(request, FAILED)


def _conditions(request: Object) -> Iterable[Object]:
    return request.get("status", {}).get("conditions") or ()


def _has(request: Object, kind: str) -> bool:
    return any(item["type"] == kind for item in _conditions(request))


async def _deny(cluster: Cluster, request: Object, message: str) -> None:
    if _has(request, APPROVED):
        # Somebody has approved it by hand; approval cannot be taken back, and gives no certificate by itself.
        await _condition(cluster, request, FAILED, REFUSED, message, "status")
    else:
        await _condition(cluster, request, DENIED, REFUSED, message, "approval")


async def _condition(
    cluster: Cluster, request: Object, kind: str, reason: str, message: str, subresource: str
) -> Object:
    """Add a condition; fails with Conflict if the request has changed since it was read."""
    made = {"type": kind, "status": "True", "reason": reason, "message": message[:_MESSAGE_MAX]}
    change = {
        "metadata": {"resourceVersion": request["metadata"]["resourceVersion"]},
        "status": {"conditions": [*_conditions(request), made]},
    }
    return await cluster.patch(request, change, subresource)
