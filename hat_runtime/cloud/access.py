"""Who may use this cloud. Without TLS nobody is asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import grpc

from hat_runtime.cloud.assembly import ProtocolError
from hat_runtime.cloud.documents import DocumentStore
from hat_runtime.cloud.peer import Peer
from hat_runtime.json_document import MAX_BYTES
from hat_runtime.security.denied import DeniedError, DenyList, parse
from hat_runtime.security.folder import TlsFolder
from hat_runtime.security.spiffe import CLOUD, DEVICE, SpiffeId

log = logging.getLogger(__name__)

ENFORCE_S = 1.0
"""Between two looks at the streams that are open."""


class Denied(DocumentStore[DenyList]):
    """The deny-list in effect."""

    def __init__(self) -> None:
        super().__init__(DenyList(), parse, MAX_BYTES)
        self.on_change: Callable[[], None] = lambda: None
        """Called when another list is in effect."""

    def changed(self, new: DenyList) -> None:
        """Tell those who wait for it."""
        log.info("deny-list %d: %d entries", new.version, len(new.identities) + len(new.serials))
        self.on_change()

    def start_from(self, path: Path) -> None:
        """Take the list of a file, as it is at the start; one that is missing is logged, and nobody is denied.

        Raises:
            DeniedError: the file is there but cannot be understood: to go on would let everybody in.
        """
        try:
            with path.open("rb") as file:
                text = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            log.info("--denied-file %s is not there; nobody is denied yet", path)
            return
        except OSError as error:
            raise DeniedError("--denied-file", str(path), error.strerror or str(error)) from error
        try:
            self.current = parse(text)
        except DeniedError as error:
            raise DeniedError("--denied-file", str(path), str(error)) from error
        log.info("deny-list %d of --denied-file %s", self.current.version, path)


class Access:
    """The decision on peers: by trust domain, tenant, kind, deny-list and the end of the certificate."""

    def __init__(self, folder: TlsFolder | None = None, denied: Denied | None = None) -> None:
        """Decide for the cloud whose certificate is in `folder`; None: without TLS, everybody may."""
        self.folder = folder
        self.denied = denied or Denied()

    @classmethod
    def of(cls, tls: Path | None, denied_file: Path | None) -> Access:
        """What --tls and --denied-file say.

        Raises:
            UsageError: one of them cannot be used.
        """
        access = cls(None if tls is None else TlsFolder(tls, CLOUD))
        if denied_file is not None:
            access.denied.start_from(denied_file)
        return access

    def check(self, peer: Peer) -> None:
        """Return if the peer may use this cloud now.

        Raises:
            ProtocolError: PERMISSION_DENIED: it may not; ABORTED: its certificate has expired since it connected.
        """
        if self.folder is None:
            return
        refuse = grpc.StatusCode.PERMISSION_DENIED
        if peer.identity is None:
            raise ProtocolError("a certificate is needed", refuse)
        if (reason := self.why_not(peer.identity, peer.serial, DEVICE)) is not None:
            raise ProtocolError(reason, refuse)
        if peer.expires is not None and datetime.now(UTC) > peer.expires:
            text = f"the certificate of this connection expired at {peer.expires}: connect with a new one"
            raise ProtocolError(text, grpc.StatusCode.ABORTED)

    def why_not(self, identity: SpiffeId, serial: int, kind: str) -> str | None:
        """Why somebody with this certificate may not; None: of the right kind, a tenant that is served, not denied."""
        assert self.folder is not None
        material = self.folder.current()
        own = material.identity
        # Only its own tenant's operator may change what holds for all.
        tenants = material.tenants if kind == DEVICE else {own.tenant}
        if identity.kind != kind:
            return f"{identity} is no {kind}"
        if identity.trust_domain != own.trust_domain or identity.tenant not in tenants:
            served = " or ".join(map(repr, sorted(tenants)))
            return f"{identity} is not of tenant {served} in {own.trust_domain}, which this cloud serves"
        if self.denied.current.denies(identity, serial):
            return f"{identity} is on the deny-list"
        return None

    async def enforce(self, end_refused: Callable[[], None]) -> None:
        """Let `end_refused` end the streams of those who may no more, until cancelled.

        It is called with each new deny-list, and again and again because certificates expire.
        """
        self.denied.on_change = end_refused
        while self.folder is not None:
            await asyncio.sleep(ENFORCE_S)
            try:
                end_refused()
            except Exception:
                log.exception("streams of certificates that ended could not be looked for; trying again")
