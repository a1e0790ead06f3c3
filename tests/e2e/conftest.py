"""Two clusters with a node each, and the chart in one of them, for all end-to-end tests.

Upstream Kubernetes stands in for K3s at the site.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.product import Product, load_images
from tests.harness.binaries import MissingProgramError
from tests.harness.ci import skip_or_fail
from tests.harness.cluster import Cluster, find_programs
from tests.harness.release import find_helm

_programs: dict[str, Path] = {}
_missing: list[str] = []


def pytest_collection_finish(session: pytest.Session) -> None:
    """Gets the programs before the first test: a build takes longer than a test may."""
    here = Path(__file__).parent
    if session.config.option.collectonly or not any(here in item.path.parents for item in session.items):
        return
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")

    def say(line: str) -> None:
        if terminal is not None:
            terminal.write_line(line)

    try:
        _programs.update(find_programs(say))
        find_helm()
    except MissingProgramError as error:
        _missing.append(f"no Kubernetes nodes: {error}")


@pytest.fixture(scope="session")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Cluster]]:
    """The cloud's cluster and the site's; the site's node is a device."""
    if _missing:
        skip_or_fail(_missing[0])
    cloud = Cluster(_programs, "cloud")
    edge = Cluster(_programs, "edge", {"hat.dev/device": "true"})
    try:
        for cluster in (cloud, edge):
            cluster.start()
            load_images(cluster.node, tmp_path_factory.mktemp(cluster.name))
        cloud.sandbox.join(edge.sandbox)
        yield cloud, edge
    finally:
        edge.stop()
        cloud.stop()


@pytest.fixture(scope="session")
def product(clusters: tuple[Cluster, Cluster], tmp_path_factory: pytest.TempPathFactory) -> Product:
    """The chart is installed and its operator runs."""
    product = Product(*clusters, tmp_path_factory.mktemp("product"))
    product.prepare()
    product.install()
    return product
