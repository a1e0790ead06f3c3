"""Clients of devices' clusters, by the kubeconfig Secrets that HatDeployments name."""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass

from hat_operator.certificates import earliest_end
from hat_operator.cluster import Cluster, ClusterError
from hat_operator.kinds import SECRET
from hat_operator.kubeconfig import KubeconfigError, client_from_kubeconfig
from hat_operator.spec import ClusterRef


class EdgeUnreachable(Exception):
    """The devices' cluster cannot be used.

    reason: SecretNotFound, KubeconfigInvalid, Unauthorized, Forbidden or Unreachable.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class _Key:
    namespace: str
    secret: str
    key: str
    context: str


class EdgeClusters:
    """Keeps a client as long as its Secret stays the same: a rotated kubeconfig is used at the next reconcile.

    A client that is dropped is not closed: another reconcile may be using it. Its threads end with the last reference.
    """

    def __init__(self, home: Cluster) -> None:
        self._home = home
        self._clients: dict[_Key, tuple[str, Cluster]] = {}
        self._ends: dict[_Key, float | None] = {}

    async def get(self, namespace: str, ref: ClusterRef) -> Cluster:
        """The cluster that a HatDeployment of this namespace names.

        Raises:
            EdgeUnreachable: there is no such Secret or key, it may not be read, or its kubeconfig is refused.
            ClusterError: the operator's own cluster did not answer.
        """
        secret = ref.kubeconfig
        try:
            found = await self._home.get(SECRET, secret.name, namespace)
        except ClusterError as error:
            if error.reason == "Forbidden":
                text = f"the operator may not read the Secret {secret.name!r}"
                raise EdgeUnreachable("Forbidden", text) from None
            raise
        key = _key(namespace, ref)
        if found is None:
            self._clients.pop(key, None)
            raise EdgeUnreachable("SecretNotFound", f"there is no Secret {secret.name!r} in {namespace!r}")
        content = found.get("data", {}).get(secret.key)
        if content is None:
            self._clients.pop(key, None)
            text = f"the Secret {secret.name!r} has no key {secret.key!r}; it has {sorted(found.get('data', {}))}"
            raise EdgeUnreachable("SecretNotFound", text)
        version = f"{found['metadata']['uid']}/{found['metadata']['resourceVersion']}"
        known = self._clients.get(key)
        if known is not None and known[0] == version:
            return known[1]
        self._clients.pop(key, None)
        try:
            text = base64.b64decode(content).decode()
            identity = hashlib.sha256(f"{ref.context}\n{text}".encode()).hexdigest()
            cluster = Cluster(client_from_kubeconfig(text, ref.context), identity=identity)
            self._ends[key] = earliest_end(text, ref.context)
        except (KubeconfigError, binascii.Error, UnicodeDecodeError) as error:
            detail = str(error) if isinstance(error, KubeconfigError) else "is not text"
            raise EdgeUnreachable("KubeconfigInvalid", f"Secret {secret.name!r}: {detail}") from None
        self._clients[key] = (version, cluster)
        return cluster

    def certificate_end(self, namespace: str, ref: ClusterRef) -> float | None:
        """When the kubeconfig that `get` read last ends (certificates.earliest_end); None: nothing says so."""
        return self._ends.get(_key(namespace, ref))


def _key(namespace: str, ref: ClusterRef) -> _Key:
    return _Key(namespace, ref.kubeconfig.name, ref.kubeconfig.key, ref.context)


def unreachable(error: ClusterError) -> EdgeUnreachable | None:
    """What a failed request says about the whole cluster; None if only that request failed."""
    return EdgeUnreachable(error.reason, str(error)) if error.cluster_away else None
