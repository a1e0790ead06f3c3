from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hat_operator.identity.authority import ROTATE, STEP, AuthorityError, advanced, fresh, is_root, read
from hat_runtime.security.pki import Authority
from hat_runtime.security.spiffe import SpiffeId

DOMAIN = "hat.internal"
_PEM = serialization.Encoding.PEM
NOW = datetime(2026, 1, 1, tzinfo=UTC)
DEVICE = SpiffeId(DOMAIN, "team", "device", "node-1")


def secret(data: dict[str, Any], **annotations: str) -> dict[str, Any]:
    return {"metadata": {"annotations": annotations or None}, "data": data}


def moved(found: dict[str, Any], now: datetime) -> dict[str, Any]:
    change = advanced(found, DOMAIN, now)
    assert change is not None
    data = {**found["data"], **change}
    return secret({key: value for key, value in data.items() if value is not None})


def trusted(found: dict[str, Any]) -> list[bytes]:
    return [item.public_bytes(_PEM) for item in read(found, DOMAIN).trusted]


def issue(found: dict[str, Any], now: datetime) -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return read(found, DOMAIN).authority.certify(DEVICE, key, now, now + timedelta(hours=24))


def accepts(found: dict[str, Any], certificate: x509.Certificate) -> bool:
    """Whether who trusts what this Secret says takes the certificate."""
    for root in read(found, DOMAIN).trusted:
        try:
            certificate.verify_directly_issued_by(root)
        except (ValueError, InvalidSignature):  # another issuer's name, or another key
            continue
        return True
    return False


def test_a_new_one_signs_and_is_trusted() -> None:
    found = secret(fresh(DOMAIN, NOW))
    assert accepts(found, issue(found, NOW))
    assert not accepts(secret(fresh(DOMAIN, NOW)), issue(found, NOW))
    assert advanced(found, DOMAIN, NOW + timedelta(days=365)) is None


def test_a_replacement_never_leaves_anybody_alone() -> None:
    """At each moment whoever renewed within a day takes the certificate of whoever else did."""
    now, found = NOW, secret(fresh(DOMAIN, NOW), **{ROTATE: "now"})
    old = issue(found, NOW)
    history = [(now, found)]
    steps = 0
    for _ in range(20):
        now += timedelta(hours=6)
        if advanced(found, DOMAIN, now) is not None:
            found = moved(found, now)
            steps += 1
        history = [(at, state) for at, state in [*history, (now, found)] if now - at <= timedelta(hours=24)]
        made = [issue(state, at) for at, state in history]
        assert all(accepts(state, certificate) for _, state in history for certificate in made)
    assert steps == 3
    assert len(read(found, DOMAIN).trusted) == 1
    assert not accepts(found, old)
    assert advanced(found, DOMAIN, now + timedelta(days=30)) is None


def test_it_is_replaced_a_year_before_its_end() -> None:
    found = secret(fresh(DOMAIN, NOW))
    end = read(found, DOMAIN).authority.certificate.not_valid_after_utc
    assert advanced(found, DOMAIN, end - timedelta(days=366)) is None
    assert len(trusted(moved(found, end - timedelta(days=364)))) == 2


def test_the_next_one_signs_only_when_everybody_knows_it() -> None:
    asked = secret(fresh(DOMAIN, NOW), **{ROTATE: "yes"})
    announced = moved(asked, NOW)
    assert read(announced, DOMAIN).authority.certificate == read(asked, DOMAIN).authority.certificate
    assert advanced(announced, DOMAIN, NOW + STEP - timedelta(minutes=1)) is None
    signing = moved(announced, NOW + STEP)
    assert read(signing, DOMAIN).authority.certificate != read(asked, DOMAIN).authority.certificate
    assert trusted(signing) == trusted(announced)


def encoded(**files: bytes) -> dict[str, str]:
    return {name.replace("_", "."): base64.b64encode(content).decode() for name, content in files.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tls.crt": None}, "there is no tls.crt"),
        ({"tls.key": None}, "there is no tls.key"),
        (encoded(tls_crt=b"x"), "tls.crt holds no certificate"),
        (encoded(tls_key=b"secret words"), "tls.key is no private key"),
        (encoded(ca_crt=b"x"), "ca.crt holds no certificate"),
        ({"tls.key": "%"}, "there is no tls.key"),
    ],
)
def test_what_is_wrong_is_named_and_no_key_is_shown(change: dict[str, Any], words: str) -> None:
    data = {**fresh(DOMAIN, NOW), **change}
    with pytest.raises(AuthorityError, match=words) as error:
        read(secret({key: value for key, value in data.items() if value is not None}), DOMAIN)
    assert "secret words" not in str(error.value)


def test_another_ones_key_or_a_leaf_is_refused() -> None:
    one, two = fresh(DOMAIN, NOW), fresh(DOMAIN, NOW)
    with pytest.raises(AuthorityError, match=r"tls.key is not the key of tls.crt"):
        read(secret({**one, "tls.key": two["tls.key"]}), DOMAIN)
    leaf = Authority.create(DOMAIN).issue("team", "cloud", "chat")
    data = {**one, **encoded(tls_crt=leaf.certificate.public_bytes(_PEM), tls_key=leaf.key_pem)}
    with pytest.raises(AuthorityError, match="not that of an authority"):
        read(secret(data), DOMAIN)


def test_an_authority_of_somebody_elses_hands_out_its_chain() -> None:
    """As cert-manager writes it: tls.crt is an intermediate authority, ca.crt the root."""
    root = Authority.create("corp.example")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "team")])
    middle = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(root.certificate.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=900))
        .add_extension(x509.BasicConstraints(True, None), critical=True)
        .sign(root.key, hashes.SHA256())
    )
    pem = key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    data = encoded(tls_crt=middle.public_bytes(_PEM), tls_key=pem, ca_crt=root.certificate.public_bytes(_PEM))
    signing = read(secret(data), DOMAIN)
    assert signing.chain == (middle,)
    assert signing.trusted == (root.certificate,)
    assert x509.load_pem_x509_certificates(signing.after) == [middle, root.certificate]
    assert is_root(root.certificate)
    assert not is_root(middle)
