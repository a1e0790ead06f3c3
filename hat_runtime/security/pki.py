"""A certificate authority in a folder, for hosts without Kubernetes and for tests.

ECDSA P-256. Keys are written with mode 0600 and never replaced. Profiles are those of docs/operations.md, Certificates.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hat_runtime.errors import UsageError
from hat_runtime.security.folder import CA_FILE, CERTIFICATE_FILE, KEY_FILE
from hat_runtime.security.spiffe import CLOUD, IdentityError, SpiffeId

CA_CERTIFICATE_FILE, CA_KEY_FILE = "ca.crt", "ca.key"
CA_YEARS = 10
SKEW = timedelta(minutes=5)
"""Certificates begin so long ago: the clocks of two machines differ."""


@dataclass(frozen=True)
class Authority:
    """A certificate authority and the trust domain that it speaks for."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    trust_domain: str

    @classmethod
    def create(cls, trust_domain: str, *, now: datetime | None = None) -> Authority:
        """A new authority that is good for 10 years. Raises UsageError for what is no trust domain."""
        _identity(trust_domain, "default", CLOUD, "check")
        began = (now or datetime.now(UTC)) - SKEW
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"HAT {trust_domain}"[:64])])
        certificate = (
            _begun(name, name, key.public_key(), began, began + timedelta(days=365 * CA_YEARS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(_names([f"spiffe://{trust_domain}"], ()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key, trust_domain)

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """The authority that `save` wrote. Raises UsageError, which names the file that is wrong."""
        try:
            certificate = x509.load_pem_x509_certificate((folder / CA_CERTIFICATE_FILE).read_bytes())
            key = serialization.load_pem_private_key((folder / CA_KEY_FILE).read_bytes(), None)
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        except (OSError, ValueError, TypeError, x509.ExtensionNotFound) as error:
            raise UsageError(f"--ca {folder} was not made by `hat pki init`: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise UsageError(f"--ca {folder}: {CA_KEY_FILE} is no ECDSA key; make another by `hat pki init`")
        return cls(certificate, key, uri.removeprefix("spiffe://"))

    def save(self, folder: Path) -> None:
        """Write ca.crt and ca.key (mode 0600). Raises UsageError where one of them exists."""
        _write(
            folder,
            {CA_KEY_FILE: _key_pem(self.key), CA_CERTIFICATE_FILE: _pem(self.certificate)},
        )

    def issue(
        self,
        tenant: str,
        kind: str,
        name: str,
        *,
        lifetime: timedelta = timedelta(hours=24),
        now: datetime | None = None,
        also: Iterable[str] = (),
    ) -> Issued:
        """A new key and a certificate for it, which is good from five minutes ago for `lifetime` from now on.

        Args:
            tenant: a DNS label.
            kind: DEVICE, CLOUD or OPERATOR of spiffe.py.
            name: of the one who gets it.
            lifetime: more than 0.
            now: when it is issued; default: now.
            also: further tenants that a cloud serves.

        Raises:
            UsageError: a name or the lifetime is wrong, or `also` is for somebody who is no cloud.
        """
        if lifetime <= timedelta():
            raise UsageError(f"--hours {lifetime.total_seconds() / 3600:g}: must be more than 0")
        identity = _identity(self.trust_domain, tenant, kind, name)
        others = [_identity(self.trust_domain, other, kind, name) for other in also]
        if others and kind != CLOUD:
            raise UsageError(f"--also {others[0].tenant}: only a cloud serves other tenants than its own")
        moment = now or datetime.now(UTC)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.certify(identity, key.public_key(), moment - SKEW, moment + lifetime, others)
        return Issued(identity, certificate, key, self.certificate)

    def certify(
        self,
        identity: SpiffeId,
        key: ec.EllipticCurvePublicKey,
        begin: datetime,
        end: datetime,
        others: Iterable[SpiffeId] = (),
    ) -> x509.Certificate:
        """A certificate of `identity` for a key that somebody else holds; it ends before the authority's.

        A cloud's is also for the tenants of `others`.
        """
        dns_names = dict.fromkeys(name for one in (identity, *others) for name in one.dns_names)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name[:64])])
        usage = ExtendedKeyUsageOID.SERVER_AUTH if identity.kind == CLOUD else ExtendedKeyUsageOID.CLIENT_AUTH
        end = min(end, self.certificate.not_valid_after_utc)
        return (
            _begun(subject, self.certificate.subject, key, begin, end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(_names([str(identity)], dns_names), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
            .sign(self.key, hashes.SHA256())
        )


@dataclass(frozen=True)
class Issued:
    """A certificate with its key, and the authority's certificate."""

    identity: SpiffeId
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    authority: x509.Certificate

    @property
    def key_pem(self) -> bytes:
        """The key as text."""
        return _key_pem(self.key)

    def save(self, folder: Path) -> None:
        """Write what `--tls FOLDER` takes, the key with mode 0600. Raises UsageError where a file exists."""
        _write(
            folder,
            {
                KEY_FILE: _key_pem(self.key),
                CERTIFICATE_FILE: _pem(self.certificate),
                CA_FILE: _pem(self.authority),
            },
        )


def _identity(trust_domain: str, tenant: str, kind: str, name: str) -> SpiffeId:
    try:
        return SpiffeId(trust_domain, tenant, kind, name)
    except IdentityError as error:
        raise UsageError(str(error)) from error


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, begin: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
    )


def _names(uris: Iterable[str], dns_names: Iterable[str]) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName(
        [*map(x509.UniformResourceIdentifier, uris), *map(x509.DNSName, dns_names)]
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        if (folder / name).exists():
            raise UsageError(f"--out {folder}: {name} is there already; keys are never overwritten")
    for name, content in files.items():
        mode = 0o600 if name.endswith(".key") else 0o644
        with os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
