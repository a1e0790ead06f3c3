"""The certificate authority of a namespace, kept in its Secret hat-ca: made once, replaced without an interruption.

What is signed with comes from tls.crt and tls.key, what is trusted from ca.crt. A replacement takes three steps, each
after everybody holds what the one before gave out: the next authority is trusted, it signs, the old one is forgotten.
An authority that somebody else has put there (cert-manager, for one) is used as it is.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hat_operator import names
from hat_operator.cluster import Cluster, ClusterError, Object
from hat_operator.kinds import SECRET
from hat_runtime.security.pki import SKEW, Authority

log = logging.getLogger(__name__)
SECRET_NAME = "hat-ca"  # noqa: S105 (the name of an object)
ROTATE = f"{names.GROUP}/rotate"
"""Annotation of the Secret: with any value, a replacement begins."""
CERTIFICATE, KEY, TRUSTED, NEXT_CERTIFICATE, NEXT_KEY = "tls.crt", "tls.key", "ca.crt", "next.crt", "next.key"
STEP = timedelta(hours=25)
"""Longer than the life of a certificate: after it everybody has renewed."""
END_MARGIN = timedelta(days=365)
"""So long before its end an authority is replaced."""


class AuthorityError(Exception):
    """The Secret cannot be used; the text says which key of it, never what a private key is."""


@dataclass(frozen=True)
class Signing:
    """What certificates of a namespace are signed with."""

    authority: Authority
    chain: tuple[x509.Certificate, ...]
    """Of intermediate authorities, the signing one first; empty where that one is trusted itself."""
    trusted: tuple[x509.Certificate, ...]

    @property
    def after(self) -> bytes:
        """PEM of what follows a certificate that is handed out: the chain, and whom to trust."""
        return self.intermediates + self.bundle.encode()

    @property
    def intermediates(self) -> bytes:
        """PEM of the chain."""
        return b"".join(map(pem, self.chain))

    @property
    def bundle(self) -> str:
        """PEM of whom to trust."""
        return b"".join(map(pem, self.trusted)).decode()


def read(secret: Mapping[str, Any], trust_domain: str) -> Signing:
    """The authority in a Secret.

    Raises:
        AuthorityError: names the key that is missing or wrong.
    """
    own = _certificates(secret, CERTIFICATE)
    key = _private_key(secret, KEY)
    if key.public_key() != own[0].public_key():
        raise AuthorityError(f"Secret {SECRET_NAME}: {KEY} is not the key of {CERTIFICATE}")
    try:
        basic = own[0].extensions.get_extension_for_class(x509.BasicConstraints).value
        if not basic.ca:
            raise AuthorityError(f"Secret {SECRET_NAME}: {CERTIFICATE} is not that of an authority")
    except x509.ExtensionNotFound:
        raise AuthorityError(f"Secret {SECRET_NAME}: {CERTIFICATE} is not that of an authority") from None
    trusted = _certificates(secret, TRUSTED) if TRUSTED in secret.get("data", {}) else own
    roots = tuple(item for item in trusted if is_root(item))
    if not roots:
        raise AuthorityError(f"Secret {SECRET_NAME}: {TRUSTED} holds no self-signed certificate")
    return Signing(Authority(own[0], key, trust_domain), tuple(c for c in own if not is_root(c)), roots)


def is_root(certificate: x509.Certificate) -> bool:
    """Whether a certificate is signed by itself."""
    try:
        certificate.verify_directly_issued_by(certificate)
    except Exception:  # of several kinds, by what does not fit
        return False
    return True


def fresh(trust_domain: str, now: datetime) -> dict[str, str]:
    """Data of a Secret with a new authority."""
    made = Authority.create(trust_domain, now=now)
    return _encoded(
        {CERTIFICATE: pem(made.certificate), KEY: _key_pem(made.key), TRUSTED: pem(made.certificate)}
    )


def advanced(secret: Mapping[str, Any], trust_domain: str, now: datetime) -> dict[str, str | None] | None:
    """What changes in the data of an authority's own Secret at this moment; None where nothing does.

    Raises:
        AuthorityError: see `read`.
    """
    data, current = secret["data"], _certificates(secret, CERTIFICATE)[0]
    if NEXT_CERTIFICATE in data:
        following = _certificates(secret, NEXT_CERTIFICATE)[0]
        if now < following.not_valid_before_utc + SKEW + STEP:
            return None
        return {
            CERTIFICATE: data[NEXT_CERTIFICATE],
            KEY: data[NEXT_KEY],
            NEXT_CERTIFICATE: None,
            NEXT_KEY: None,
        }
    if len(_certificates(secret, TRUSTED)) > 1:
        # Two steps after it was made: one until it signed, one until nobody had a certificate of the one before.
        if now < current.not_valid_before_utc + SKEW + 2 * STEP:
            return None
        return {**_encoded({TRUSTED: pem(current)})}
    asked = ROTATE in (secret["metadata"].get("annotations") or {})
    if not asked and now < current.not_valid_after_utc - END_MARGIN:
        return None
    made = Authority.create(trust_domain, now=now)
    return {
        **_encoded(
            {
                NEXT_CERTIFICATE: pem(made.certificate),
                NEXT_KEY: _key_pem(made.key),
                TRUSTED: pem(current) + pem(made.certificate),
            }
        )
    }


class Authorities:
    """Authorities of all namespaces that the operator serves."""

    def __init__(self, home: Cluster, trust_domain: str) -> None:
        self._home = home
        self._trust_domain = trust_domain
        self._known: dict[str, tuple[str, Signing]] = {}

    async def get(self, namespace: str) -> Signing:
        """That of a namespace; one is made where there is none.

        Raises:
            AuthorityError: the Secret cannot be used.
            ClusterError: it can be neither read nor made.
        """
        secret = await self._home.get(SECRET, SECRET_NAME, namespace) or await self._create(namespace)
        if secret["metadata"].get("labels", {}).get(names.LABEL_MANAGED_BY) == names.FIELD_MANAGER:
            change = advanced(secret, self._trust_domain, datetime.now(UTC))
            if change is not None:
                version = secret["metadata"]["resourceVersion"]
                meta = {"resourceVersion": version, "annotations": {ROTATE: None}}
                secret = await self._home.patch(_typed(secret), {"data": change, "metadata": meta})
                log.info(
                    "%s: the authority in the Secret %s moves on: %s", namespace, SECRET_NAME, sorted(change)
                )
        version = secret["metadata"]["resourceVersion"]
        known = self._known.get(namespace)
        if known is None or known[0] != version:
            self._known[namespace] = known = (version, read(secret, self._trust_domain))
        return known[1]

    def known(self, namespace: str) -> Signing | None:
        """What `get` has found last."""
        found = self._known.get(namespace)
        return None if found is None else found[1]

    async def _create(self, namespace: str) -> Object:
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "kubernetes.io/tls",
            "metadata": {
                "name": SECRET_NAME,
                "namespace": namespace,
                "labels": {names.LABEL_MANAGED_BY: names.FIELD_MANAGER},
            },
            "data": fresh(self._trust_domain, datetime.now(UTC)),
        }
        try:
            return await self._home.create(body)
        except ClusterError as error:
            if error.reason != "Conflict":
                raise
        found = await self._home.get(SECRET, SECRET_NAME, namespace)
        if found is None:
            raise ClusterError("Conflict", f"Secret {namespace}/{SECRET_NAME} comes and goes")
        return found


def _typed(secret: Object) -> Object:
    return {"apiVersion": "v1", "kind": "Secret", **secret}


def _encoded(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: base64.b64encode(content).decode() for name, content in files.items()}


def _content(secret: Mapping[str, Any], name: str) -> bytes:
    try:
        return base64.b64decode(secret.get("data", {})[name], validate=True)
    except (KeyError, binascii.Error, TypeError):
        raise AuthorityError(f"Secret {SECRET_NAME}: there is no {name}") from None


def _certificates(secret: Mapping[str, Any], name: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_content(secret, name))
    except (ValueError, x509.InvalidVersion):
        raise AuthorityError(f"Secret {SECRET_NAME}: {name} holds no certificate in PEM") from None


def _private_key(secret: Mapping[str, Any], name: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(_content(secret, name), None)
    except (ValueError, TypeError):
        raise AuthorityError(
            f"Secret {SECRET_NAME}: {name} is no private key in PEM without a passphrase"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise AuthorityError(f"Secret {SECRET_NAME}: {name} is no ECDSA key")
    return key


def pem(certificate: x509.Certificate) -> bytes:
    """A certificate as text."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
