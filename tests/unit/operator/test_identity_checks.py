"""What the operator signs, and every way of asking for more that was thought of."""

from __future__ import annotations

import base64
import copy
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from hat_operator import names
from hat_operator.identity.checks import NODE_NAME, POD_NAME, POD_UID, Refused, Side, check
from tests.unit.operator.samples import REMOTE, SETTINGS, hat

Object = dict[str, Any]
KEY = ec.generate_private_key(ec.SECP256R1())
DEVICE = "spiffe://hat.internal/tenant/team/device/node-1"
CLOUD = "spiffe://hat.internal/tenant/team/cloud/chat"
CLOUD_DNS = ("hat-cloud.hat.internal", "team.hat.internal.hat-cloud.hat.internal")


def csr(
    *uris: str,
    dns: tuple[str, ...] = (),
    key: Any = KEY,
    subject: tuple[x509.NameAttribute[Any], ...] = (),
    more: tuple[x509.ExtensionType, ...] = (),
    others: tuple[x509.GeneralName, ...] = (),
) -> bytes:
    asked = [*map(x509.UniformResourceIdentifier, uris), *map(x509.DNSName, dns), *others]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(subject))
    if asked:
        builder = builder.add_extension(x509.SubjectAlternativeName(asked), critical=True)
    for extension in more:
        builder = builder.add_extension(extension, critical=True)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM)


def pod(name: str, node: str, component: str = names.EDGE, namespace: str = "team") -> Object:
    kind, owner = (
        ("DaemonSet", "chat-edge-cpu") if component == names.EDGE else ("ReplicaSet", "chat-cloud-ab12-x")
    )
    return {
        "metadata": {
            "name": name,
            "uid": f"uid-{name}",
            "namespace": namespace,
            "ownerReferences": [{"kind": kind, "name": owner, "controller": True}],
        },
        "spec": {"nodeName": node, "serviceAccountName": f"chat-{component}"},
        "status": {"phase": "Pending"},
    }


def request(component: str = names.EDGE, pem: bytes | None = None, **spec: Any) -> Object:
    """What the pod of node-1 files, or a replica; `spec` replaces fields."""
    device = component == names.EDGE
    pem = pem or (csr(DEVICE) if device else csr(CLOUD, dns=CLOUD_DNS))
    bound = {
        POD_NAME: ["one" if device else "replica"],
        POD_UID: ["uid-one" if device else "uid-replica"],
        NODE_NAME: ["node-1"],
    }
    filed = {
        "signerName": "hat.dev/device" if device else "hat.dev/cloud",
        "username": f"system:serviceaccount:team:chat-{component}",
        "extra": bound,
        "usages": ["digital signature", "client auth" if device else "server auth"],
        "request": base64.b64encode(pem).decode(),
        **spec,
    }
    return {"metadata": {"name": "csr-1"}, "spec": filed}


def side(
    component: str = names.EDGE, nodes: frozenset[str] | None = frozenset({"node-1", "node-2"}), **spec: Any
) -> Side:
    device = component == names.EDGE
    pods = [pod("one", "node-1"), pod("two", "node-2"), pod("gone", "node-3")] if device else []
    return Side(hat(**spec), component, pods or [pod("replica", "node-1", names.CLOUD)], nodes)


def test_a_device_gets_its_own_name_for_its_own_key() -> None:
    granted = check(request(), side(), SETTINGS)
    assert str(granted.identity) == DEVICE
    assert granted.key == KEY.public_key()


def test_a_replica_gets_the_clouds() -> None:
    granted = check(request(names.CLOUD), side(names.CLOUD), SETTINGS)
    assert (str(granted.identity), granted.identity.dns_names) == (CLOUD, CLOUD_DNS)


def test_a_device_at_a_site_is_of_the_namespace_of_its_hatdeployment() -> None:
    far = hat(edge={"clusterRef": REMOTE}, cloud={"expose": {"host": "h"}})
    filed = request(username="system:serviceaccount:far:chat-edge")
    granted = check(filed, Side(far, names.EDGE, [pod("one", "node-1", namespace="far")], None), SETTINGS)
    assert granted.identity.tenant == "team"


def test_kubernetes_before_1_30_does_not_name_the_node() -> None:
    filed = request()
    del filed["spec"]["extra"][NODE_NAME]
    assert str(check(filed, side(), SETTINGS).identity) == DEVICE
    filed["spec"]["request"] = base64.b64encode(csr(DEVICE.replace("node-1", "node-2"))).decode()
    with pytest.raises(Refused, match="node-2"):
        check(filed, side(), SETTINGS)


DER = x509.load_pem_x509_csr(csr(DEVICE)).public_bytes(serialization.Encoding.DER)
SIDE = side()
CN = x509.NameAttribute(NameOID.COMMON_NAME, "node-2")
WRONG_KEYS = {
    "rsa": rsa.generate_private_key(65537, 2048),
    "p384": ec.generate_private_key(ec.SECP384R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate(),
}
WRONG_REQUESTS: dict[str, tuple[bytes, str]] = {
    "another device": (csr(DEVICE.replace("node-1", "node-2")), "must ask for exactly that"),
    "another tenant": (csr(DEVICE.replace("team", "other")), "must ask for exactly that"),
    "another trust domain": (csr(DEVICE.replace("hat.internal", "evil.example")), "exactly that"),
    "another kind": (csr(DEVICE.replace("/device/", "/operator/")), "exactly that"),
    "the cloud": (csr(CLOUD, dns=CLOUD_DNS), "exactly that"),
    "two names": (csr(DEVICE, DEVICE.replace("node-1", "node-2")), "exactly that"),
    "its name twice": (csr(DEVICE, DEVICE), "exactly that"),
    "a DNS name besides": (csr(DEVICE, dns=("hat-cloud.hat.internal",)), "exactly that"),
    "an e-mail address besides": (csr(DEVICE, others=(x509.RFC822Name("a@b.c"),)), "exactly that"),
    "its name as DNS": (csr(dns=(DEVICE.removeprefix("spiffe://").split("/")[0],)), "exactly that"),
    "longer at its end": (csr(f"{DEVICE}/x"), "exactly that"),
    "another case": (csr(DEVICE.upper()), "exactly that"),
    "a subject": (csr(DEVICE, subject=(CN,)), "subject 'CN=node-2' must be empty"),
    "only a subject": (csr(subject=(x509.NameAttribute(NameOID.COMMON_NAME, DEVICE[:64]),)), "must be empty"),
    "no name": (csr(), "no other extension"),
    "an authority": (csr(DEVICE, more=(x509.BasicConstraints(True, None),)), "2.5.29.19"),
    "more usages inside": (
        csr(DEVICE, more=(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),)),
        "2.5.29.37",
    ),
    "no request": (
        b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        "PKCS #10",
    ),
    "too long": (b"#" * 20000 + csr(DEVICE), "PKCS #10"),
    **{f"{name} key": (csr(DEVICE, key=key), "ECDSA P-256") for name, key in WRONG_KEYS.items()},
}


@pytest.mark.parametrize("name", WRONG_REQUESTS)
def test_a_wrong_request_is_refused_with_the_reason(name: str) -> None:
    pem, words = WRONG_REQUESTS[name]
    with pytest.raises(Refused, match=words):
        check(request(pem=pem), side(), SETTINGS)


def test_a_request_for_a_key_that_its_author_does_not_hold() -> None:
    """Somebody else's public key, signed with one's own."""
    other = ec.generate_private_key(ec.SECP256R1())
    spki = [
        key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        for key in (KEY, other)
    ]
    forged = DER.replace(*spki)
    assert forged != DER
    with pytest.raises(Refused, match="not signed with its own key"):
        check(request(pem=armoured(forged)), side(), SETTINGS)


def armoured(der: bytes) -> bytes:
    text = base64.encodebytes(der).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{text}-----END CERTIFICATE REQUEST-----\n".encode()


def edited(change: Callable[[Object], Any], component: str = names.EDGE) -> Object:
    filed = copy.deepcopy(request(component))
    change(filed["spec"])
    return filed


def extra(**values: list[str] | None) -> Callable[[Object], Any]:
    keys = {"pod": POD_NAME, "uid": POD_UID, "node": NODE_NAME}

    def change(spec: Object) -> None:
        for key, value in values.items():
            if value is None:
                del spec["extra"][keys[key]]
            else:
                spec["extra"][keys[key]] = value

    return change


WRONG_AUTHORS: dict[str, tuple[Callable[[Object], Any], str]] = {
    "another account": (lambda spec: spec.update(username="system:serviceaccount:team:default"), "filed by"),
    "another namespace": (
        lambda spec: spec.update(username="system:serviceaccount:other:chat-edge"),
        "filed by",
    ),
    "the cloud's account": (
        lambda spec: spec.update(username="system:serviceaccount:team:chat-cloud"),
        "filed by",
    ),
    "a person": (lambda spec: spec.update(username="kubernetes-admin"), "filed by"),
    "nobody": (lambda spec: spec.pop("username"), "filed by None"),
    "an unbound token": (lambda spec: spec.pop("extra"), "not bound to a pod"),
    "no pod": (extra(pod=None), "not bound to a pod"),
    "two pods": (extra(pod=["one", "two"]), "not bound to a pod"),
    "an unknown pod": (extra(pod=["zero"], uid=["uid-zero"]), "none of team/chat's"),
    "a pod before this one": (extra(uid=["uid-older"]), "none of team/chat's"),
    "another node's pod": (extra(pod=["two"], uid=["uid-two"], node=["node-2"]), "must ask for exactly that"),
    "a token of another node": (extra(node=["node-2"]), "bound to node 'node-2'"),
    "a node that is no device": (extra(pod=["gone"], uid=["uid-gone"], node=["node-3"]), "deviceSelector"),
    "another signer": (lambda spec: spec.update(signerName="hat.dev/cloud"), "signerName"),
    "kubelet's signer": (
        lambda spec: spec.update(signerName="kubernetes.io/kube-apiserver-client"),
        "signerName",
    ),
    "for servers": (lambda spec: spec.update(usages=["digital signature", "server auth"]), "usages"),
    "for both": (
        lambda spec: spec.update(usages=["digital signature", "client auth", "server auth"]),
        "usages",
    ),
    "to sign": (lambda spec: spec.update(usages=["digital signature", "client auth", "cert sign"]), "usages"),
    "for nothing": (lambda spec: spec.update(usages=[]), "usages"),
    "not base64": (lambda spec: spec.update(request="%%%"), "PKCS #10"),
}


@pytest.mark.parametrize("name", WRONG_AUTHORS)
def test_a_wrong_author_is_refused_with_the_reason(name: str) -> None:
    change, words = WRONG_AUTHORS[name]
    with pytest.raises(Refused, match=words):
        check(edited(change), side(), SETTINGS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found["metadata"].update(ownerReferences=[]), "is not of a DaemonSet"),
        (
            lambda found: found["metadata"]["ownerReferences"][0].update(kind="ReplicaSet"),
            "is not of a DaemonSet",
        ),
        (lambda found: found["metadata"]["ownerReferences"][0].update(name="other-edge-cpu"), "is not of a"),
        (lambda found: found["spec"].update(serviceAccountName="default"), "runs as 'default'"),
        (lambda found: found["spec"].pop("nodeName"), "runs on ''"),
        (lambda found: found["status"].update(phase="Failed"), "has ended"),
    ],
)
def test_a_pod_that_is_not_the_daemonsets(change: Callable[[Object], Any], words: str) -> None:
    found = pod("one", "node-1")
    change(found)
    with pytest.raises(Refused, match=words):
        check(request(), Side(hat(), names.EDGE, [found], None), SETTINGS)


def test_a_denied_device_gets_none() -> None:
    with pytest.raises(Refused, match=r"node-1 is in spec\.security\.deniedDevices"):
        check(request(), side(security={"deniedDevices": ["node-1"]}), SETTINGS)


@settings(max_examples=100, deadline=None)
@given(
    field=st.sampled_from(["signerName", "username", "usages", "request"]),
    value=st.one_of(st.text(max_size=60), st.lists(st.text(max_size=20), max_size=4)),
)
def test_whatever_else_a_field_holds_is_refused(field: str, value: Any) -> None:
    if value == request()["spec"][field] or (field == "usages") != isinstance(value, list):
        return
    with pytest.raises(Refused):
        check(request(**{field: value}), SIDE, SETTINGS)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_flipped_bits_are_refused_or_change_nothing(data: st.DataObject) -> None:
    """A request of which a byte has changed is never signed for another key or name."""
    der = bytearray(DER)
    at = data.draw(st.integers(0, len(der) - 1))
    der[at] ^= data.draw(st.integers(1, 255))
    refused_or_the_same(bytes(der))


def test_each_byte_of_the_header_flipped() -> None:
    """Lengths, the version and the subject."""
    for at in range(40):
        for bits in (1, 0x80, 0xFF):
            refused_or_the_same(DER[:at] + bytes([DER[at] ^ bits]) + DER[at + 1 :])


def refused_or_the_same(der: bytes) -> None:
    try:
        granted = check(request(pem=armoured(der)), SIDE, SETTINGS)
    except Refused:
        return
    assert (str(granted.identity), granted.key) == (DEVICE, KEY.public_key())
