"""Certificates that live for a minute, and the step from none to some, both while clients ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cryptography import x509

from tests.e2e.product import SITE_NAMESPACE, TEAM, Product
from tests.e2e.test_rollout import traffic
from tests.harness.cluster import Cluster

pytestmark = [pytest.mark.timeout(1200), pytest.mark.default_model, pytest.mark.long]
NAME = "certified"
LIFE_S = 90
ROTATIONS = 2


@pytest.fixture(scope="module")
def certified(product: Product) -> Iterator[Product]:
    """Ready without certificates, with an operator that signs for a short time."""
    chart = str(product.helm.chart)
    settings = ("--reuse-values", "--set", f"identities.maxSeconds={LIFE_S}")
    product.helm.run("upgrade", "hat", chart, "--wait", "--timeout=120s", *settings)
    try:
        product.apply(product.example(metadata__name=NAME, spec__security={"tls": "off"}))
        product.wait_ready(NAME, 400)
        yield product
        product.delete(NAME)
    finally:
        product.helm.run("rollback", "hat", "1", "--wait", "--timeout=120s")


def serial(product: Product, cluster: Cluster, namespace: str) -> int:
    """Number of the certificate that the pod uses now."""
    (pod,) = product.objects(cluster, namespace, "pods", f"hat.dev/deployment={NAME}")
    asked = ("-n", namespace, "exec", pod["metadata"]["name"], "-c", "identity", "--", "cat", "/tls/tls.crt")
    return x509.load_pem_x509_certificate(cluster.kubectl(*asked).stdout.encode()).serial_number


def test_certificates_are_switched_on_under_traffic(certified: Product) -> None:
    before = certified.hat(NAME)["status"]["cloud"]["revision"]
    with traffic(certified, NAME) as lost:
        certified.patch(NAME, {"security": {"tls": "mutual"}})
        certified.wait_ready(NAME, 500)
    assert lost == []
    assert certified.hat(NAME)["status"]["cloud"]["revision"] != before
    (device,) = certified.objects(certified.edge, SITE_NAMESPACE, "pods", f"hat.dev/deployment={NAME}")
    assert "--tls" in device["spec"]["containers"][0]["args"]


def test_certificates_are_replaced_under_traffic(certified: Product) -> None:
    places = ((certified.edge, SITE_NAMESPACE), (certified.cloud, TEAM))
    seen = {namespace: {serial(certified, cluster, namespace)} for cluster, namespace in places}

    def replaced() -> bool:
        for cluster, namespace in places:
            seen[namespace].add(serial(certified, cluster, namespace))
        return all(len(found) > ROTATIONS for found in seen.values())

    with traffic(certified, NAME) as lost:
        certified.wait("both sides have replaced their certificates", replaced, 4 * LIFE_S * ROTATIONS)
    assert lost == []
    for cluster, namespace in places:
        (pod,) = certified.objects(cluster, namespace, "pods", f"hat.dev/deployment={NAME}")
        assert [item["restartCount"] for item in pod["status"]["containerStatuses"]] == [0]
        assert {item["name"]: item["restartCount"] for item in pod["status"]["initContainerStatuses"]}[
            "identity"
        ] == 0
