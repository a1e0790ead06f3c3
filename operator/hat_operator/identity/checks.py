"""Whether a CertificateSigningRequest may be signed. Pure.

The API server vouches for who has filed it (username, and the pod and node that its token is bound to); everything
else in it is a claim.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

from hat_operator import names
from hat_operator.identity import who
from hat_operator.settings import Settings
from hat_operator.spec import HatDeployment
from hat_runtime.security.spiffe import IdentityError, SpiffeId

POD_NAME = "authentication.kubernetes.io/pod-name"
POD_UID = "authentication.kubernetes.io/pod-uid"
NODE_NAME = "authentication.kubernetes.io/node-name"
_OWNERS = {names.CLOUD: "ReplicaSet", names.EDGE: "DaemonSet"}
_UNREADABLE = (
    *(ValueError, TypeError, UnsupportedAlgorithm),
    *(x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType),
)
"""What cryptography raises for a request that it cannot read; binascii.Error is a ValueError."""
_MAX_BYTES = 16 << 10
Object = Mapping[str, Any]


class Refused(Exception):
    """Why a request is not signed, for people; it ends up in the request's condition."""


@dataclass(frozen=True)
class Side:
    """What is known of one side of a HatDeployment, read after the requests were."""

    hat: HatDeployment
    component: str
    """names.CLOUD or names.EDGE."""
    pods: Iterable[Object]
    """Of this side, in its namespace."""
    nodes: frozenset[str] | None
    """Those that the device selector matches; None: the operator may not read nodes. Of the devices' side only."""

    @property
    def account(self) -> str:
        """Name of the pods' service account."""
        return names.cloud(self.hat) if self.component == names.CLOUD else names.edge(self.hat)

    @property
    def namespace(self) -> str:
        """Of the pods."""
        return self.hat.namespace if self.component == names.CLOUD else names.edge_namespace(self.hat)


@dataclass(frozen=True)
class Granted:
    """Who gets a certificate, and for which key."""

    identity: SpiffeId
    key: ec.EllipticCurvePublicKey


def check(request: Object, side: Side, settings: Settings) -> Granted:
    """Who has filed this request, if it asks for exactly what that one may have.

    Raises:
        Refused: it does not, or it was filed by someone else.
    """
    spec, kind = request["spec"], who.KINDS[side.component]
    if spec.get("signerName") != who.signer(kind):
        raise Refused(f"signerName {spec.get('signerName')!r}: must be {who.signer(kind)}")
    pod = _pod(spec, side)
    node = str(pod["spec"].get("nodeName") or "")
    claimed = _extra(spec, NODE_NAME)
    if not node or claimed not in (None, node):
        raise Refused(f"the token is bound to node {claimed!r}, the pod runs on {node!r}")
    if side.component == names.EDGE:
        _check_device(node, side)
    usages = who.usages(kind)
    if sorted(spec.get("usages", ())) != sorted(usages):
        raise Refused(f"usages {spec.get('usages')!r}: must be {usages}")
    try:
        wanted = (
            who.cloud(side.hat, settings)
            if side.component == names.CLOUD
            else who.device(side.hat, settings, node)
        )
    except IdentityError as error:
        raise Refused(str(error)) from error
    return Granted(wanted, _key(spec.get("request", ""), wanted))


def _pod(spec: Object, side: Side) -> Object:
    """The pod whose token was used."""
    account = f"system:serviceaccount:{side.namespace}:{side.account}"
    if spec.get("username") != account:
        raise Refused(f"filed by {spec.get('username')!r}: must be {account}")
    name, uid = _extra(spec, POD_NAME), _extra(spec, POD_UID)
    if name is None or uid is None:
        raise Refused("the token is not bound to a pod")
    for pod in side.pods:
        meta = pod["metadata"]
        if (meta["name"], meta["uid"]) == (name, uid):
            break
    else:
        raise Refused(f"pod {name} ({uid}) is none of {side.hat.namespace}/{side.hat.name}'s")
    owner: Object = next((ref for ref in meta.get("ownerReferences", ()) if ref.get("controller")), {})
    kind, begin = _OWNERS[side.component], f"{side.account}-"
    if owner.get("kind") != kind or not str(owner.get("name", "")).startswith(begin):
        raise Refused(f"pod {name} is not of a {kind} {begin}...")
    if pod["spec"].get("serviceAccountName") != side.account:
        raise Refused(f"pod {name} runs as {pod['spec'].get('serviceAccountName')!r}")
    if pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
        raise Refused(f"pod {name} has ended")
    return pod


def _check_device(node: str, side: Side) -> None:
    if node in side.hat.spec.security.denied:
        raise Refused(f"device {node} is in spec.security.deniedDevices")
    if side.nodes is not None and node not in side.nodes:
        raise Refused(f"node {node} does not match spec.edge.deviceSelector")


def _extra(spec: Object, key: str) -> str | None:
    """What the API server says of the token; None if it says nothing, or not one thing."""
    found: list[Any] = spec.get("extra", {}).get(key) or []
    return str(found[0]) if len(found) == 1 else None


def _key(text: str, wanted: SpiffeId) -> ec.EllipticCurvePublicKey:
    """The key that the request proves to hold, if it names `wanted` and nobody else."""
    try:
        pem = base64.b64decode(text, validate=True)
        if len(pem) > _MAX_BYTES:
            raise ValueError("too long")
        request = x509.load_pem_x509_csr(pem)
        key = request.public_key()
        extensions = list(request.extensions)
        signed = request.is_signature_valid
    except _UNREADABLE as error:
        raise Refused(
            f"request: is no PKCS #10 request in PEM that can be read ({type(error).__name__})"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Refused("request: the key must be ECDSA P-256")
    if not signed:
        raise Refused("request: not signed with its own key")
    if list(request.subject):
        raise Refused(f"request: the subject {request.subject.rfc4514_string()!r} must be empty")
    others = [item.oid.dotted_string for item in extensions if not _is_names(item)]
    if others or len(extensions) != 1:
        raise Refused(
            f"request: must have subject alternative names and no other extension; it has also {others}"
        )
    asked: x509.SubjectAlternativeName = extensions[0].value
    names_asked = sorted((type(name).__name__, _text(name)) for name in asked)
    names_due = sorted(
        [("UniformResourceIdentifier", str(wanted)), *(("DNSName", name) for name in wanted.dns_names)]
    )
    if names_asked != names_due:
        shown, due = [value for _, value in names_asked], [value for _, value in names_due]
        raise Refused(f"request: names {shown!r}: this pod may have {due!r} and must ask for exactly that")
    return key


def _is_names(extension: x509.Extension[Any]) -> bool:
    return isinstance(extension.value, x509.SubjectAlternativeName)


def _text(name: x509.GeneralName) -> str:
    return str(name.value)
