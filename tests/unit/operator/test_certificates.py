"""When a kubeconfig's certificates end."""

from __future__ import annotations

import base64
import datetime

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from hat_operator.certificates import earliest_end
from hat_operator.kubeconfig import KubeconfigError

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def pem(days: int) -> bytes:
    """A certificate that ends so many days after NOW."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(NOW).not_valid_after(NOW + datetime.timedelta(days))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def kubeconfig(client: bytes | None = None, authority: bytes | None = None) -> str:
    user = (
        {"token": "t"} if client is None else {"client-certificate-data": base64.b64encode(client).decode()}
    )
    cluster = {"server": "https://192.0.2.1:6443"}
    if authority is not None:
        cluster["certificate-authority-data"] = base64.b64encode(authority).decode()
    other = {"client-certificate-data": base64.b64encode(pem(1)).decode()}
    return yaml.safe_dump(
        {
            "current-context": "site",
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": user}, {"name": "v", "user": other}],
            "contexts": [
                {"name": "site", "context": {"cluster": "c", "user": "u"}},
                {"name": "second", "context": {"cluster": "c", "user": "v"}},
            ],
        }
    )


def after(days: int) -> float:
    return (NOW + datetime.timedelta(days)).timestamp()


def test_the_first_of_client_and_authority_counts() -> None:
    assert earliest_end(kubeconfig(pem(30), pem(60))) == after(30)
    assert earliest_end(kubeconfig(pem(90), pem(60))) == after(60)
    assert earliest_end(kubeconfig(None, pem(60))) == after(60)


def test_of_several_authorities_the_last_one_counts_and_of_a_chain_the_clients_own() -> None:
    assert earliest_end(kubeconfig(pem(300) + pem(10), pem(20) + pem(100))) == after(100)


def test_the_context_that_is_used_counts() -> None:
    assert earliest_end(kubeconfig(pem(30)), "second") == after(1)
    with pytest.raises(KubeconfigError, match="there is no 'third'"):
        earliest_end(kubeconfig(), "third")


def test_nothing_is_said_where_nothing_can_be_read() -> None:
    assert earliest_end(kubeconfig()) is None
    assert earliest_end(kubeconfig(b"no certificate", b"\xff")) is None
    text = kubeconfig().replace("token: t", "client-certificate-data: '%'")
    assert earliest_end(text) is None
