"""The folder of --tls: who this process is, and whose certificates it accepts.

The files are looked at when they are needed, at most once in CHECK_S seconds: new ones are in use from the next
connection on, and nothing has to wake up for them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from hat_runtime.errors import UsageError
from hat_runtime.security.spiffe import IdentityError, SpiffeId

log = logging.getLogger(__name__)

CERTIFICATE_FILE, KEY_FILE, CA_FILE = "tls.crt", "tls.key", "ca.crt"
CHECK_S = 1.0
MAX_BYTES = 1 << 20
"""Of a file."""


@dataclass(frozen=True)
class Material:
    """What the three files hold, checked to go together."""

    chain: bytes
    """PEM, own certificate first."""
    key: bytes = field(repr=False)
    """PEM."""
    authorities: bytes
    """PEM."""
    certificate: x509.Certificate = field(repr=False, compare=False)
    """Own one."""
    identity: SpiffeId = field(compare=False)
    """Of `certificate`."""
    tenants: frozenset[str] = field(default=frozenset(), compare=False)
    """Whom a cloud with this certificate may serve."""

    def why_not_valid(self, now: datetime | None = None) -> str | None:
        """As the function of that name."""
        return why_not_valid(self.certificate, now)


class TlsFolder:
    """The files of a folder as they are now. For any thread."""

    def __init__(
        self, path: Path, kind: str, *, option: str = "--tls", clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Read the files.

        Args:
            path: the folder.
            kind: what its owner has to be: DEVICE, CLOUD or OPERATOR of spiffe.py.
            option: for messages.
            clock: seconds.

        Raises:
            UsageError: names the file that is missing or wrong, or the identity of another kind.
        """
        self.path = path
        self.kind = kind
        self._option = option
        self._clock = clock
        self._lock = threading.Lock()
        self._checked_s = clock()
        found = self._read()
        self._material = self._parse(found)
        self._seen: tuple[bytes, bytes, bytes] | str = found
        self._trouble: str | None = None
        # What is wrong with what was seen, until it is logged.

    def current(self) -> Material:
        """The newest files that go together; what was looked at in the last second is not looked at again."""
        with self._lock:
            now = self._clock()
            if now - self._checked_s >= CHECK_S:
                self._checked_s = now
                self._look()
            return self._material

    def _look(self) -> None:
        found: tuple[bytes, bytes, bytes] | str
        try:
            found = self._read()
        except UsageError as error:
            found = str(error)
        if found == self._seen:
            if (
                self._trouble is not None
            ):  # not just a look between the first file that was replaced and the last
                log.error("%s; the certificate before stays in use", self._trouble)
                self._trouble = None
            return
        self._seen, self._trouble = found, None
        if isinstance(found, str):
            self._trouble = found
            return
        try:
            self._material = self._parse(found)
        except UsageError as error:
            self._trouble = str(error)
        else:
            end = self._material.certificate.not_valid_after_utc
            log.info("%s %s: new files, %s until %s", self._option, self.path, self._material.identity, end)

    def _read(self) -> tuple[bytes, bytes, bytes]:
        chain, key, authorities = map(self._file, (CERTIFICATE_FILE, KEY_FILE, CA_FILE))
        return chain, key, authorities

    def _file(self, name: str) -> bytes:
        try:
            with (self.path / name).open("rb") as file:
                return file.read(MAX_BYTES)
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"{self._option} {self.path}: {name} cannot be read: {reason}") from error

    def _parse(self, content: tuple[bytes, bytes, bytes]) -> Material:
        chain, key, authorities = content
        where = f"{self._option} {self.path}"
        certificate = _certificates(chain, f"{where}: {CERTIFICATE_FILE}")[0]
        _certificates(authorities, f"{where}: {CA_FILE}")
        try:
            private = serialization.load_pem_private_key(key, None)
            same = private.public_key() == certificate.public_key()
        except UnsupportedAlgorithm as error:
            raise UsageError(
                f"{where}: {KEY_FILE} or {CERTIFICATE_FILE} is of a kind that is not known"
            ) from error
        except (ValueError, TypeError) as error:  # the error's text could hold a part of the file
            raise UsageError(f"{where}: {KEY_FILE} is no private key in PEM without a passphrase") from error
        if not same:
            raise UsageError(f"{where}: {KEY_FILE} is not the key of {CERTIFICATE_FILE}")
        try:
            identity = identity_of(certificate)
        except IdentityError as error:
            raise UsageError(f"{where}: {CERTIFICATE_FILE}: {error}") from error
        if identity.kind != self.kind:
            raise UsageError(f"{where}: {CERTIFICATE_FILE} is that of {identity}, which is no {self.kind}")
        tenants = identity.tenants_of(_names(certificate, x509.DNSName))
        material = Material(chain, key, authorities, certificate, identity, tenants)
        if (reason := material.why_not_valid()) is not None:
            log.warning("%s: the certificate of %s is of no use: %s", where, identity, reason)
        return material


def why_not_valid(certificate: x509.Certificate, now: datetime | None = None) -> str | None:
    """None while the certificate is good; otherwise when it began or ended, in words."""
    moment = now or datetime.now(UTC)
    if moment < certificate.not_valid_before_utc:
        return f"not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M:%S} UTC"
    if moment > certificate.not_valid_after_utc:
        return f"expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC"
    return None


def identity_of(certificate: x509.Certificate) -> SpiffeId:
    """The one SPIFFE id of a certificate.

    Raises:
        IdentityError: it has none, several, or one of another form.
    """
    uris = _names(certificate, x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise IdentityError(f"{len(uris)} URI names: a certificate must have one, its SPIFFE id")
    return SpiffeId.parse(uris[0])


def _names(
    certificate: x509.Certificate, kind: type[x509.UniformResourceIdentifier | x509.DNSName]
) -> list[str]:
    """The alternative names of a kind; none where they cannot be read."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return names.get_values_for_type(kind)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, ValueError):
        return []


def _certificates(pem: bytes, where: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except (ValueError, x509.InvalidVersion) as error:
        raise UsageError(f"{where} holds no certificate in PEM") from error
