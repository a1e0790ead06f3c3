"""A real Prometheus reads the operator: every query about it finds something."""

from __future__ import annotations

import asyncio
from pathlib import Path

from hat_operator.cluster import Cluster
from tests.harness import binaries, boards
from tests.harness.ci import skip_or_fail
from tests.harness.controlplane import ControlPlane
from tests.harness.prometheus import Prometheus, Target
from tests.operator.home import Home, inline, remote, store_kubeconfig
from tests.operator.running import Operator

ROUNDS = 120


def wanted(namespace: str) -> dict[str, str]:
    """Every query about the operator, by where it stands."""
    found = {}
    for name in boards.BOARDS:
        for title, expr in boards.queries(name):
            if "hat_operator_" not in expr:
                continue
            found[f"{name}: {title}: {expr}"] = boards.filled(expr, namespace=namespace, deployment="chat")
    for rule in boards.rules():
        for selector in boards.selectors(rule["expr"]):
            found[f"{rule.get('alert', '')}: {selector.text}"] = selector.text
    return {where: expr for where, expr in found.items() if "hat_operator_" in expr}


async def test_every_query_about_the_operator_finds_something(
    home: Home,
    site: tuple[Cluster, str],
    edge_plane: ControlPlane,
    control_plane: ControlPlane,
    tmp_path: Path,
) -> None:
    try:
        program = binaries.find("prometheus")
    except binaries.MissingProgramError as error:
        skip_or_fail(str(error))
    _, namespace = site
    await store_kubeconfig(home, inline(edge_plane))
    await home.create(**remote(namespace))
    with Operator(control_plane, home.namespace, tmp_path) as operator:
        # The namespace of the operator's own pod: figures of a HatDeployment keep theirs.
        target = Target(
            f"127.0.0.1:{operator.metrics_port}", {"namespace": "hat-system", "pod": "operator-0"}
        )
        with Prometheus(program, tmp_path, [target]) as prometheus:
            missing = wanted(home.namespace)
            assert len(missing) > 15
            for _ in range(ROUNDS):
                for where, expr in list(missing.items()):
                    if prometheus.has_data(expr):
                        del missing[where]
                if not missing:
                    break
                await asyncio.sleep(0.5)
            assert list(missing) == []
            own = f'{{namespace="{home.namespace}",name="chat"}}'
            assert len(prometheus.query(f"hat_operator_devices{own}")) == 4
            await home.cluster.delete(await home.hat())
            for _ in range(ROUNDS):
                if not prometheus.query(f"hat_operator_devices{own}"):
                    break
                await asyncio.sleep(0.5)
            certificate = "hat_operator_edge_certificate_expiry_timestamp_seconds"
            assert [prometheus.query(f"{name}{own}") for name in ("hat_operator_devices", certificate)] == [
                [],
                [],
            ]
