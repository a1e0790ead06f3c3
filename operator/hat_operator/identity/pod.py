"""What a pod does for its own certificate: make a key, ask, wait, write, and again before the end.

The key is made here, goes into a folder in the pod's memory and nowhere else.
"""

from __future__ import annotations

import base64
import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hat_operator.identity.api import ApiError, Requests
from hat_runtime.errors import HatError
from hat_runtime.security.folder import CA_FILE, CERTIFICATE_FILE, KEY_FILE
from hat_runtime.security.spiffe import CLOUD, SpiffeId

log = logging.getLogger(__name__)
RENEW_AT = 2 / 3
"""Part of a certificate's life after which it is replaced."""
POLL_S = (0.2, 0.5, 1.0, 2.0, 5.0)
AGAIN_S = (2.0, 5.0, 10.0, 30.0, 60.0)
"""Between two tries where one failed."""
DENIED_S = 600.0
"""After a refusal, while the certificate from before is good: each request is an event that somebody reads."""
GIVE_UP_S = 3600.0
"""An open request is left and another one filed: the API server forgets it some day."""
_DATA = "..data"


class DeniedError(HatError):
    """The operator does not sign this; its reason is the text."""


@dataclass(frozen=True)
class Held:
    """The certificate in the folder."""

    begin: float
    """Unix seconds at which it came, and"""
    end: float
    """at which it ends."""

    @property
    def renew_at(self) -> float:
        """Unix seconds."""
        return self.begin + RENEW_AT * (self.end - self.begin)


class Identity:
    """Keeps the certificate in a folder fresh."""

    def __init__(
        self,
        identity: SpiffeId,
        folder: Path,
        requests: Requests,
        labels: Mapping[str, str],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Nothing happens yet; `labels` are those of each request, by which the operator finds it."""
        self._identity = identity
        self._folder = folder
        self._requests = requests
        self._labels = dict(labels)
        self._sleep = sleep

    def keep(self) -> None:
        """Never returns. What fails is tried again.

        Raises:
            DeniedError: the operator refuses, and there is no certificate from before that is still good.
        """
        held = self.held()
        failures = 0
        while True:
            if held is not None and (left := held.renew_at - time.time()) > 0:
                self._sleep(min(left, 60.0))  # in pieces: the clock may jump
                continue
            try:
                held = self.renew()
                failures = 0
                log.info(
                    "%s: good until %s", self._identity, datetime.fromtimestamp(held.end, UTC).isoformat()
                )
            except (ApiError, DeniedError, OSError) as error:
                if isinstance(error, DeniedError) and (held is None or held.end <= time.time()):
                    raise
                # Not all devices at once when an API server comes back.
                wait_s = (
                    DENIED_S if isinstance(error, DeniedError) else AGAIN_S[min(failures, len(AGAIN_S) - 1)]
                )
                wait_s *= random.uniform(0.8, 1.2)
                failures += 1
                log.warning("no certificate: %s; again in %.0f s", error, wait_s)
                self._sleep(wait_s)

    def held(self) -> Held | None:
        """What an earlier process of this pod left, if it fits; its begin is that of the files."""
        try:
            certificate = x509.load_pem_x509_certificate((self._folder / CERTIFICATE_FILE).read_bytes())
            key = serialization.load_pem_private_key((self._folder / KEY_FILE).read_bytes(), None)
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            begin = (self._folder / CERTIFICATE_FILE).stat().st_mtime
        except (OSError, ValueError, TypeError, x509.InvalidVersion, x509.ExtensionNotFound):
            return None
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        if uris != [str(self._identity)] or key.public_key() != certificate.public_key():
            return None
        return Held(begin, certificate.not_valid_after_utc.timestamp())

    def renew(self) -> Held:
        """Make a new key and get a certificate for it.

        Raises:
            ApiError: the API server did not answer, refused, or gave what cannot be used.
            DeniedError: the operator refuses.
            OSError: the folder cannot be written.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        filed = self._requests.create(self._body(key))
        name = filed["metadata"]["name"]
        log.info("%s: asked for a certificate: %s", self._identity, name)
        chain, trusted = _parted(self._wait(name), key.public_key(), self._identity)
        files = {
            KEY_FILE: key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
            CERTIFICATE_FILE: _pem(chain),
            CA_FILE: _pem(trusted),
        }
        write_together(self._folder, files)
        return Held(time.time(), chain[0].not_valid_after_utc.timestamp())

    def _body(self, key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
        names = [
            x509.UniformResourceIdentifier(str(self._identity)),
            *map(x509.DNSName, self._identity.dns_names),
        ]
        request = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([]))
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .sign(key, hashes.SHA256())
        )
        kind = self._identity.kind
        return {
            "apiVersion": "certificates.k8s.io/v1",
            "kind": "CertificateSigningRequest",
            "metadata": {"generateName": f"hat-{kind}-", "labels": self._labels},
            "spec": {
                "signerName": f"hat.dev/{kind}",
                "usages": ["digital signature", "server auth" if kind == CLOUD else "client auth"],
                "request": base64.b64encode(request.public_bytes(serialization.Encoding.PEM)).decode(),
            },
        }

    def _wait(self, name: str) -> bytes:
        """PEM that the operator has put into the request."""
        until = time.monotonic() + GIVE_UP_S
        failed = 0
        for turn in range(1 << 30):
            self._sleep(POLL_S[min(turn // 5, len(POLL_S) - 1)])
            try:
                status = self._requests.get(name).get("status", {})
            except ApiError as error:
                failed += 1
                if error.status or failed > 10:
                    raise
                continue
            for condition in status.get("conditions") or ():
                if condition["type"] in ("Denied", "Failed"):
                    raise DeniedError(f"{name} is denied: {condition.get('message', '')}")
            if status.get("certificate"):
                return base64.b64decode(status["certificate"])
            if time.monotonic() > until:
                break
        raise ApiError(0, f"{name} was not answered: is the operator there?")


def write_together(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace all files of a folder in one moment, as kubelet does: they are links into a folder that is swapped.

    Raises:
        OSError: the folder cannot be written; what was there stays.
    """
    content = folder / f"..{time.time_ns()}"
    content.mkdir(mode=0o700)
    for name, data in files.items():
        with os.fdopen(os.open(content / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
    before = os.readlink(folder / _DATA) if (folder / _DATA).is_symlink() else None
    swap = folder / f"{_DATA}_new"
    swap.unlink(missing_ok=True)
    swap.symlink_to(content.name)
    swap.replace(folder / _DATA)
    for name in files:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"{_DATA}/{name}")
    if before is not None:
        shutil.rmtree(folder / before, ignore_errors=True)


def _parted(
    pem: bytes, key: ec.EllipticCurvePublicKey, identity: SpiffeId
) -> tuple[list[x509.Certificate], list[x509.Certificate]]:
    """The own certificate with intermediate ones behind it, and whom to trust: those that are signed by themselves."""
    try:
        found = x509.load_pem_x509_certificates(pem)
    except (ValueError, x509.InvalidVersion):
        raise ApiError(0, "the operator's answer holds no certificate in PEM") from None
    if found[0].public_key() != key:
        raise ApiError(0, f"the certificate for {identity} is not for this pod's key")
    trusted = [item for item in found[1:] if item.issuer == item.subject]
    if not trusted:
        raise ApiError(0, "the operator's answer does not say whom to trust")
    return [item for item in found if item not in trusted], trusted


def _pem(certificates: list[x509.Certificate]) -> bytes:
    return b"".join(item.public_bytes(serialization.Encoding.PEM) for item in certificates)
