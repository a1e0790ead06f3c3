"""The images, built by `make images`' script with buildah from the real Dockerfiles."""

from __future__ import annotations

import pytest

from tests.images import checks
from tests.images.conftest import Built, build
from tests.images.machine import Buildah

# The first run makes the base image and fetches wheels.
pytestmark = pytest.mark.timeout(1200)
OPERATOR_MB = 260
"""Over its base. A torch would be ten times that."""


def test_metadata(built: Built) -> None:
    checks.check_metadata(built)


def test_commands_as_its_user(built: Built, container: str) -> None:
    checks.check_commands(built, container)


def test_packages_are_the_locked_ones(built: Built, container: str) -> None:
    checks.check_packages(built, container)


def test_size(built: Built, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    size = built.buildah.size_mb(built.reference)
    own = size - built.buildah.size_mb(base)
    with capsys.disabled():
        mounted = ", torch mounted" if built.volumes else ""
        print(f" hat-{built.name}: {size:.0f} MB, {own:.0f} MB of them over its base{mounted}", end=" ")
    if built.name == "operator":
        assert own < OPERATOR_MB


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["operator", "cloud", "edge"])
def test_full_image(buildah: Buildah, base: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    full = build(buildah, base, name, full=True)
    checks.check_metadata(full)
    with buildah.container(full.reference) as container:
        checks.check_commands(full, container)
        checks.check_packages(full, container)
    with capsys.disabled():
        print(f" hat-{name}: {buildah.size_mb(full.reference):.0f} MB", end=" ")
