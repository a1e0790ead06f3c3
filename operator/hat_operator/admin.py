"""How the operator reaches a pod of the cloud: where, and with which certificate.

A pod with a port named admin is asked there, by mutual TLS; one of a revision without certificates at its HTTP port.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from hat_operator import names
from hat_operator.identity import who
from hat_operator.identity.authority import Authorities, AuthorityError, Signing, pem
from hat_operator.settings import DEVICES_URL, Settings

log = logging.getLogger(__name__)
DEVICES_PATH = "/v1/devices"
LIFE_S = 24 * 3600.0
TLS_URL = f"https://{{ip}}:{names.ADMIN_PORT}{DEVICES_PATH}"


@dataclass(frozen=True)
class Door:
    """Where one pod listens to the operator."""

    url: str
    """Of its list of devices."""
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """For aiohttp's requests."""

    def at(self, path: str) -> str:
        """URL of another of its documents, /v1/..."""
        return self.url.removesuffix(DEVICES_PATH) + path


def has_admin_port(pod: Mapping[str, Any]) -> bool:
    """Whether a pod of the cloud talks to operators with certificates only."""
    ports = [port for item in pod["spec"]["containers"] for port in item.get("ports", ())]
    return any(port.get("name") == names.ADMIN for port in ports)


class Doors:
    """Doors of all pods. The operator's own certificates are made here, one for each namespace."""

    def __init__(
        self, settings: Settings, authorities: Authorities | None = None, tls_url: str = TLS_URL
    ) -> None:
        """Without authorities pods with certificates cannot be asked; `tls_url` is where they list their devices."""
        self._tls_url = tls_url
        self._settings = settings
        self._authorities = authorities
        self._contexts: dict[str, tuple[Signing, float, ssl.SSLContext]] = {}

    async def of(self, pod: Mapping[str, Any]) -> Door:
        """The door of a pod that has an address.

        Raises:
            AuthorityError: the namespace's authority is not known, so that no certificate can be made.
        """
        meta, address = pod["metadata"], str(pod["status"].get("podIP", ""))
        place = {
            "ip": f"[{address}]" if ":" in address else address,
            "namespace": meta["namespace"],
            "pod": meta["name"],
        }
        # What the user has set is where to ask, whatever the pod has.
        if self._settings.devices_url != DEVICES_URL or not has_admin_port(pod):
            return Door(self._settings.devices_url.format(**place))
        context = await self._context(meta["namespace"])
        server = who.operator(meta["namespace"], self._settings).cloud_dns_name
        return Door(self._tls_url.format(**place), {"ssl": context, "server_hostname": server})

    async def _context(self, namespace: str) -> ssl.SSLContext:
        signing = None if self._authorities is None else self._authorities.known(namespace)
        if signing is None:
            raise AuthorityError("no reconcile has read the authority yet")
        known = self._contexts.get(namespace)
        if known is None or known[0] is not signing or time.monotonic() - known[1] > LIFE_S / 2:
            identity = who.operator(namespace, self._settings)
            context = await asyncio.to_thread(_make, signing, identity.name, identity.tenant)
            self._contexts[namespace] = known = (signing, time.monotonic(), context)
        return known[2]


def _make(signing: Signing, name: str, tenant: str) -> ssl.SSLContext:
    """A context with a new certificate of the operator's."""
    issued = signing.authority.issue(tenant, "operator", name, lifetime=timedelta(seconds=LIFE_S))
    context = ssl.create_default_context(cadata=signing.bundle)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The standard library reads a key from a file only.
    handle, path = tempfile.mkstemp(prefix="hat-operator-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(issued.key_pem + pem(issued.certificate) + signing.intermediates)
        context.load_cert_chain(path)
    finally:
        os.unlink(path)
    return context
