"""Real control planes for the operator's tests: one for the cloud's cluster, one for the devices'."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hat_operator.cluster import Cluster
from hat_operator.kubeconfig import client_from_kubeconfig
from tests.harness import kwok
from tests.harness.binaries import CONTROL_PLANE, MissingProgramError, find_all
from tests.harness.ci import skip_or_fail
from tests.harness.controlplane import ControlPlane
from tests.operator.home import Home, inline

ROOT = Path(__file__).resolve().parent.parent.parent
PLANES = {"control_plane", "edge_plane"}
_programs: dict[str, Path] = {}
_missing: list[str] = []


def pytest_collection_finish(session: pytest.Session) -> None:
    """Gets the programs before the first test: a build takes longer than a test may."""
    used = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if not used & PLANES or session.config.option.collectonly:
        return
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")

    def say(line: str) -> None:
        if terminal is not None:
            terminal.write_line(line)

    try:
        _programs.update(find_all((*CONTROL_PLANE, *(kwok.PROGRAMS if "programs" in used else ())), say))
    except MissingProgramError as error:
        _missing.append(f"no Kubernetes control plane: {error}")


@pytest.fixture(scope="session")
def programs(control_plane: ControlPlane) -> dict[str, Path]:
    """Paths of the programs of a control plane and of a fleet of fake nodes."""
    return _programs


@contextmanager
def _running(name: str) -> Iterator[ControlPlane]:
    if _missing:
        skip_or_fail(_missing[0])
    # Heartbeats of fake nodes may be late on a busy machine; no test here is about a node that is lost.
    plane = ControlPlane(_programs, name, audit=True, node_grace_s=600)
    plane.start()
    try:
        plane.install_crds(ROOT / "crds")
        yield plane
    finally:
        plane.stop()


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """The cloud's cluster, with the CRD. Its attributes: `kubeconfig` (a path), `client()`, `kubectl(...)`."""
    with _running("cloud") as plane:
        yield plane


@pytest.fixture(scope="session")
def edge_plane() -> Iterator[ControlPlane]:
    """A second cluster for devices. It has the CRD too, so that a wrong write there would succeed and be seen."""
    with _running("edge") as plane:
        yield plane


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    """A fresh namespace of the cloud's cluster, deleted after the test."""
    with control_plane.namespace() as name:
        yield name


@pytest.fixture
def home(control_plane: ControlPlane, namespace: str) -> Iterator[Home]:
    """A Reconciler for a fresh namespace of the cloud's cluster."""
    cluster = Cluster(client_from_kubeconfig(inline(control_plane)))
    yield Home(cluster, namespace)
    cluster.close()


@pytest.fixture
def site(edge_plane: ControlPlane) -> Iterator[tuple[Cluster, str]]:
    """A namespace in the devices' cluster."""
    cluster = Cluster(client_from_kubeconfig(inline(edge_plane)))
    with edge_plane.namespace() as name:
        yield cluster, name
    cluster.close()
