"""Who the parties of a HatDeployment are, and what they call themselves. Pure."""

from __future__ import annotations

from hat_operator import names
from hat_operator.settings import Settings
from hat_operator.spec import HatDeployment
from hat_runtime.security.spiffe import CLOUD, DEVICE, OPERATOR, SpiffeId

KINDS = {names.CLOUD: CLOUD, names.EDGE: DEVICE}
"""Kind of identity of each side's pods."""
OPERATOR_NAME = "hat-operator"


def signer(kind: str) -> str:
    """Name of the signer of a kind, as in spec.signerName of a CertificateSigningRequest."""
    return f"{names.GROUP}/{kind}"


def usages(kind: str) -> list[str]:
    """What a certificate of a kind is for, in the words of CertificateSigningRequests."""
    return ["digital signature", "server auth" if kind == CLOUD else "client auth"]


def device(hat: HatDeployment, settings: Settings, node: str) -> SpiffeId:
    """A device: the node that it is. The tenant is the HatDeployment's namespace."""
    return SpiffeId(settings.trust_domain, hat.namespace, DEVICE, node)


def device_prefix(hat: HatDeployment, settings: Settings) -> str:
    """The SPIFFE id of a device without the node's name at its end."""
    return str(device(hat, settings, "x")).removesuffix("x")


def cloud(hat: HatDeployment, settings: Settings) -> SpiffeId:
    """Every replica of the cloud; each has a key of its own."""
    return SpiffeId(settings.trust_domain, hat.namespace, CLOUD, hat.name)


def operator(namespace: str, settings: Settings) -> SpiffeId:
    """The operator, when it talks to clouds of a namespace."""
    return SpiffeId(settings.trust_domain, namespace, OPERATOR, OPERATOR_NAME)


def request_labels(hat: HatDeployment, component: str) -> dict[str, str]:
    """Labels by which the operator finds the requests of a HatDeployment's pods; they prove nothing."""
    return {names.LABEL_MANAGED_BY: names.FIELD_MANAGER, **names.selector(hat, component)}
