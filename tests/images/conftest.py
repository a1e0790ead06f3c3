"""The images that CI builds."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from scripts import images
from tests.images.machine import Buildah, torch_volumes

REGISTRY = "registry.example.com/hat"


@dataclass(frozen=True)
class Built:
    """One built image, and what has to be mounted where it runs."""

    name: str
    reference: str
    buildah: Buildah
    volumes: tuple[str, ...]
    revision: str
    """That the build has written into the image."""

    def run(self, container: str, *command: str) -> str:
        """Standard output of a command in a container of the image, as the image's user."""
        mounts = [word for volume in self.volumes for word in ("--volume", volume)]
        return self.buildah.run("run", *mounts, container, "--", *command)


@pytest.fixture(scope="session")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Buildah:
    return Buildah(tmp_path_factory.mktemp("buildah"))


@pytest.fixture(scope="session")
def base(buildah: Buildah) -> str:
    return buildah.base()


def build(buildah: Buildah, base: str, name: str, full: bool = False) -> Built:
    """The image as `make images` builds it.

    Without `full` the base brings torch, as a Jetson's does, by mounts: then nothing has to be copied or fetched.
    """
    options: list[str] = []
    volumes: tuple[str, ...] = ()
    if name != "operator" and full:
        options = ["--variant", "cuda"]  # no torch for CPUs only is in the package index
    elif name != "operator":
        volumes = tuple(torch_volumes())
        options = ["--build-arg", "TORCH=", "--build-arg", "VENV_OPTIONS=--system-site-packages"]
        options += [word for volume in volumes for word in ("--volume", volume)]
    command = [
        sys.executable,
        str(images.ROOT / "scripts" / "images.py"),
        "--tool",
        "buildah",
        "--image",
        name,
    ]
    done = subprocess.run(
        [*command, "--registry", REGISTRY, "--base-image", base, *options],
        env=buildah.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    reference = done.stdout.rstrip().splitlines()[-1].strip()
    revision = re.search(r"REVISION=(\S+)", done.stdout)
    assert revision is not None
    return Built(name, reference, buildah, volumes, revision.group(1))


@pytest.fixture(scope="session", params=["operator", "edge", "cloud"])
def built(request: pytest.FixtureRequest, buildah: Buildah, base: str) -> Built:
    """Each of the three images."""
    return build(buildah, base, request.param)


@pytest.fixture
def container(built: Built) -> Iterator[str]:
    """A container of the built image."""
    with built.buildah.container(built.reference) as name:
        yield name
