"""What one reconcile does about identities: sign what pods ask for, and say whom the cloud has to refuse."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hat_operator import events, names
from hat_operator.children import Children, key_of
from hat_operator.cluster import Cluster, ClusterError, Object
from hat_operator.denials import REASON, Denials, news
from hat_operator.denied_push import DeniedPush
from hat_operator.identity.authority import Authorities, AuthorityError
from hat_operator.identity.signing import Signer
from hat_operator.kinds import CONFIG_MAP
from hat_operator.settings import Settings
from hat_operator.spec import HatDeployment
from hat_operator.status import Finding

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Looked:
    """After a look at one HatDeployment; all None where it has no certificates."""

    finding: Finding | None = None
    before: Denials | None = None
    after: Denials | None = None

    @property
    def denied(self) -> Mapping[str, str] | None:
        """What the ConfigMap should hold."""
        return None if self.after is None else self.after.data()


class Identities:
    """Identities of all HatDeployments."""

    def __init__(
        self, home: Cluster, settings: Settings, authorities: Authorities, push: DeniedPush | None = None
    ) -> None:
        """Without `push` pods get a new deny-list at their start only."""
        self._home = home
        self._settings = settings
        self._authorities = authorities
        self._push = push
        self._signer = Signer(home, authorities, settings)

    async def look(
        self,
        body: Object,
        hat: HatDeployment,
        cloud: Children,
        site: Cluster | None,
        nodes: Iterable[Object] | None,
    ) -> Looked:
        """Sign, and find whom to refuse. The ConfigMap joins the cloud's children, which do not list it.

        Args:
            body: the HatDeployment as it is in the cluster.
            hat: the same, read.
            cloud: the cloud's children.
            site: where the devices are; None: there are none, or it cannot be reached.
            nodes: those that the device selector matches, as read in this pass; None: not known.

        Raises:
            ClusterError: the operator's own cluster did not answer.
        """
        if not hat.spec.security.mutual:
            self.forget(hat.namespace, hat.name)
            return Looked()
        live = await self._home.get(CONFIG_MAP, names.cloud_denied(hat), hat.namespace)
        if live is not None:
            cloud.live[key_of(live)] = live
        before = Denials.read({} if live is None else live.get("data", {}))
        found = None if nodes is None else [node["metadata"]["name"] for node in nodes]
        least = 0 if self._push is None else self._push.least(hat.namespace, hat.name)
        after = before.next(hat, self._settings, found, time.time(), least)
        return Looked(await self._sign(body, hat, site), before, after)

    async def published(self, body: Object, hat: HatDeployment, looked: Looked, cloud: Children) -> None:
        """If the ConfigMap holds the list, whatever became of other objects, the pods get it and an event says who is
        refused.

        Not before: a version that is pushed and not kept would be given to another list.
        """
        if looked.before is None or looked.after is None:
            return
        kept = cloud.live.get((CONFIG_MAP.name, names.cloud_denied(hat)), {}).get("data", {})
        if Denials.read(kept).listed != looked.after.listed:
            return
        if self._push is not None:
            self._push.want(hat.namespace, hat.name, looked.after.listed)
        text = news(looked.before.listed, looked.after.listed)
        if text is not None:
            await events.post(self._home, body, "Warning", REASON, text)

    def forget(self, namespace: str, name: str) -> None:
        """The HatDeployment is gone, or has no certificates."""
        if self._push is not None:
            self._push.forget(namespace, name)

    async def _sign(self, body: Object, hat: HatDeployment, site: Cluster | None) -> Finding:
        if not self._settings.identities:
            text = "this operator signs no certificates (identities.enabled of its chart); write security.tls: off"
            return Finding("False", "SigningDisabled", text)
        try:
            await self._authorities.get(hat.namespace)
            await self._signer.serve(body, hat, self._home, names.CLOUD)
        except AuthorityError as error:
            return Finding("False", "AuthorityInvalid", str(error))
        except ClusterError as error:
            if error.reason != "Forbidden":
                raise
            return Finding(
                "False", "SigningForbidden", f"the operator lacks a right in its own cluster: {error}"
            )
        if site is not None:
            try:
                await self._signer.serve(body, hat, site, names.EDGE)
            except ClusterError as error:
                if error.cluster_away:
                    log.info("%s/%s: requests of devices: %s", hat.namespace, hat.name, error)
                else:
                    text = f"devices get no certificates, their cluster says: {error}; see examples/hat-site.yaml"
                    return Finding(
                        "False", "SigningForbidden" if error.reason == "Forbidden" else "SigningFailed", text
                    )
        return Finding("True", "Signing", "devices and cloud get the certificates that they ask for")
