"""buildah with a storage of its own, and a base image made on the spot: no registry is needed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.harness.ci import skip_or_fail

BASE = "localhost/hat-base:bookworm"
"""Debian 12 with its Python 3.11: it has what the Dockerfiles ask of a base image."""
PACKAGES = "python3,python3-venv,ca-certificates"
MIRROR = "http://deb.debian.org/debian"
TRUST = Path("/etc/ssl/certs/ca-certificates.crt")
DIST_PACKAGES = "/usr/local/lib/python3.11/dist-packages"
LEAST_GB = 15.0
"""Less free space than this makes the kept layers go."""


def cache_folder() -> Path:
    """Where images, layers and wheels are kept between runs."""
    return Path(os.environ.get("HAT_IMAGE_CACHE") or Path.home() / ".cache" / "hat" / "images")


class Buildah:
    """Runs buildah as root, without a daemon: `--isolation chroot` needs no rights on cgroups and namespaces."""

    def __init__(self, runroot: Path) -> None:
        """`runroot` holds what does not outlive the run. Skips the test (in CI: fails it) without what is needed."""
        for program, package in (("buildah", "buildah"), ("debootstrap", "debootstrap")):
            if shutil.which(program) is None:
                skip_or_fail(f"images: no {program}; on Debian and Ubuntu: apt-get install {package}")
        if os.geteuid() != 0:
            skip_or_fail("images: building them without a daemon needs root")
        cache_folder().mkdir(parents=True, exist_ok=True)
        storage = runroot / "storage.conf"
        storage.write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{cache_folder() / "storage"}"\n'
            f'runroot = "{runroot / "run"}"\n'
        )
        # The cache mounts of a build (pip's wheels) lie in TMPDIR.
        self.environment = {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(storage),
            "BUILDAH_ISOLATION": "chroot",
            "TMPDIR": str(cache_folder()),
        }

    def run(self, *arguments: str, timeout_s: float = 900) -> str:
        """Standard output of one command; what it says on standard error when it fails is in the AssertionError."""
        done = subprocess.run(
            ["buildah", *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"buildah {' '.join(arguments)}: {done.stderr[-3000:]}"
        return done.stdout

    def inspect(self, image: str) -> dict[str, Any]:
        """The image's configuration as docker writes it."""
        found: dict[str, Any] = json.loads(self.run("inspect", "--type", "image", image))["Docker"]["config"]
        return found

    def size_mb(self, image: str) -> float:
        """Size of all layers, unpacked."""
        manifest = json.loads(self.run("images", "--json", image))
        number, unit = re.fullmatch(r"([\d.]+) ([KMG])B", manifest[0]["size"]).groups()  # type: ignore[union-attr]
        return float(number) * {"K": 1e-3, "M": 1.0, "G": 1e3}[unit]

    @contextmanager
    def container(self, image: str) -> Iterator[str]:
        """A container of an image, for `run`; deleted after the block."""
        name = self.run("from", "--pull-never", image).strip()
        try:
            yield name
        finally:
            self.run("rm", name)

    def base(self) -> str:
        """The base image; made by debootstrap where it is not in the storage yet."""
        if shutil.disk_usage(cache_folder()).free < LEAST_GB * 1e9:
            self.run("rmi", "--all", "--force")  # layers of earlier sources
        if self.run("images", "--quiet", "--filter", f"reference={BASE}").strip():
            return BASE
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            root = Path(folder, "root")
            made = subprocess.run(
                ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root), MIRROR],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=900,
                check=False,
            )
            assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
            for left in (*root.glob("var/cache/apt/archives/*.deb"), *root.glob("var/lib/apt/lists/*_*")):
                left.unlink()
            # pip in the build trusts whom this machine trusts, such as a mirror inside a company.
            if TRUST.is_file():
                shutil.copyfile(TRUST, root / TRUST.relative_to("/"))
            name = self.run("from", "scratch").strip()
            try:
                self.run("add", "--quiet", name, str(root), "/")
                self.run("commit", "--quiet", name, BASE)
            finally:
                self.run("rm", name)
        return BASE


def torch_volumes() -> list[str]:
    """Mounts that give a base image the torch of this environment, FROM:TO:ro each, as a Jetson's base brings its own.

    Copying its 5 GB into two images would take longer than everything else that CI does.
    """
    folder = Path(importlib.metadata.distribution("torch").locate_file(""))
    tops = {
        path.parts[0]
        for name in closure("torch")
        for path in importlib.metadata.distribution(name).files or ()
        if path.parts[0] not in ("..", "__pycache__")
    }
    return [f"{folder / top}:{DIST_PACKAGES}/{top}:ro" for top in sorted(tops) if (folder / top).exists()]


def closure(name: str) -> set[str]:
    """A distribution of this environment and all that it needs here."""
    seen: set[tuple[str, tuple[str, ...]]] = set()
    waiting: list[tuple[str, tuple[str, ...]]] = [(name, ())]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for text in importlib.metadata.distribution(current[0]).requires or ():
            needed = Requirement(text)
            extras = (*current[1], "")
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append((canonicalize_name(needed.name), tuple(sorted(needed.extras))))
    return {found for found, _ in seen}
