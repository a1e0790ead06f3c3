"""Changes under traffic, and upgrades of the chart: no request that a device has accepted is lost, no pod restarts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.e2e.product import OPERATOR, SITE_NAMESPACE, SYSTEM, TEAM, Product, RequestError
from tests.operator.manifests import hat_deployment

pytestmark = [pytest.mark.timeout(1200), pytest.mark.default_model, pytest.mark.long]
NAME, OTHER = "rolling", "resting"
SMALL = {"requests": {"cpu": "100m", "memory": "1Gi"}, "limits": {"memory": "3Gi"}}
RETRY_S = 240.0
ASK_AGAIN = ("Connection refused", "No route to host", "<urlopen error timed out>", '"code":"shutting_down"')
"""Signs of a request that no device has accepted: no connection came about (where an answer does not come, urllib says
TimeoutError), or an answer with status 503 and Retry-After."""


@pytest.fixture(scope="module")
def rolling(product: Product) -> Iterator[Product]:
    """Two HatDeployments: one with a device, one without."""
    resources = {"spec__cloud__resources": SMALL, "spec__edge__resources": SMALL}
    product.apply(product.example(metadata__name=NAME, **resources))
    product.apply(hat_deployment(OTHER, cloud={"resources": SMALL}))
    product.wait_ready(NAME, 400)
    product.wait_ready(OTHER, 400)
    yield product
    for name in (NAME, OTHER):
        product.delete(name)


@contextmanager
def traffic(product: Product, name: str = NAME) -> Iterator[list[str]]:
    """Clients that ask the device all the time; the list fills with requests that were accepted and not answered.

    A device whose pod is just being replaced refuses new requests: clients ask again, as OpenAI's clients do.
    """
    lost: list[str] = []
    answered = [0]
    ends = threading.Event()

    def ask() -> None:
        while not ends.is_set():
            deadline = time.monotonic() + RETRY_S
            while True:
                try:
                    product.chat(name, "Name three rivers of Europe.", 16)
                    answered[0] += 1
                    break
                except RequestError as error:
                    if not any(sign in str(error) for sign in ASK_AGAIN):
                        lost.append(str(error))
                        break
                    if time.monotonic() > deadline:
                        lost.append(f"no device answered for {RETRY_S:.0f} s: {error}")
                        break
                    time.sleep(0.5)

    clients = [threading.Thread(target=ask, daemon=True) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        product.wait("the first answer", lambda: answered[0], 120)
        yield lost
        before = answered[0]
        product.wait("an answer after the change", lambda: answered[0] > before + 1, 180)
    finally:
        ends.set()
        for client in clients:
            client.join(RETRY_S + 150)


@pytest.mark.parametrize(
    "change",
    [
        {"split": {"inputLayers": 4}},
        {"runtime": {"version": "0.1.1"}},
        {"mode": "picospec", "split": None},
    ],
    ids=["split", "version", "mode"],
)
def test_a_change_under_traffic_loses_no_request(rolling: Product, change: dict[str, Any]) -> None:
    before = rolling.hat(NAME)["status"]["cloud"]["revision"]
    with traffic(rolling) as lost:
        rolling.patch(NAME, change)
        rolling.wait_ready(NAME, 500)
        assert rolling.hat(NAME)["status"]["cloud"]["revision"] != before
    assert lost == []
    deployments = rolling.objects(rolling.cloud, TEAM, "deployments", f"hat.dev/deployment={NAME}")
    assert len(deployments) == 1, "the old revision is gone"


def pods(product: Product) -> dict[str, tuple[str, int]]:
    """Identity and restarts of every pod of both HatDeployments."""
    found = {}
    for cluster, namespace in ((product.cloud, TEAM), (product.edge, SITE_NAMESPACE)):
        for pod in product.objects(cluster, namespace, "pods", "app.kubernetes.io/managed-by=hat-operator"):
            restarts = sum(status["restartCount"] for status in pod["status"]["containerStatuses"])
            found[f"{cluster.name}/{pod['metadata']['name']}"] = (pod["metadata"]["uid"], restarts)
    return found


def operator_pods(product: Product) -> set[str]:
    found = product.objects(product.cloud, SYSTEM, "pods", "app.kubernetes.io/component=operator")
    return {pod["metadata"]["uid"] for pod in found}


def test_upgrade_and_rollback_of_the_chart_restart_no_pod(rolling: Product) -> None:
    """The new chart brings another default version; HatDeployments keep theirs."""
    before, operators = pods(rolling), operator_pods(rolling)
    assert len(before) == 3
    chart = str(rolling.helm.chart)
    settings = ("--reuse-values", "--set", "runtime.version=0.1.1", "--set", "operator.resyncSeconds=15")
    rolling.helm.run("upgrade", "hat", chart, "--wait", "--timeout=120s", *settings)
    _let_it_act(rolling)
    assert not operators & operator_pods(rolling)
    assert pods(rolling) == before
    rolling.helm.run("rollback", "hat", "1", "--wait", "--timeout=120s")
    _let_it_act(rolling)
    assert pods(rolling) == before
    assert rolling.hat(OTHER)["spec"]["runtime"]["version"] == "0.1.0"


def _let_it_act(product: Product) -> None:
    """The operator of now has put back an object that was deleted, so it has looked at everything."""
    product.cloud.kubectl("-n", SYSTEM, "rollout", "status", f"deployment/{OPERATOR}", "--timeout=50s")
    for name in (NAME, OTHER):
        product.cloud.kubectl("-n", TEAM, "delete", "pdb", f"{name}-cloud")
    for name in (NAME, OTHER):
        product.wait(
            f"{name}'s PodDisruptionBudget is back",
            lambda name=name: product.objects(  # type: ignore[misc]
                product.cloud, TEAM, "poddisruptionbudgets", f"hat.dev/deployment={name}"
            ),
            90,
        )
        product.wait_ready(name, 120)
