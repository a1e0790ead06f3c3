"""Builds of Kubernetes' programs from their Go modules."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

MODULE = "k8s.io/kubernetes"


class BuildError(Exception):
    """A build cannot be made; the text is one line."""


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Runs a command in `folder` and returns its standard output. Raises BuildError with its last words."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        words = " / ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
        raise BuildError(f"`{' '.join(command[:3])} ...` failed: {words or f'exit code {done.returncode}'}")
    return done.stdout


def _go(arguments: list[str], folder: Path) -> str:
    if shutil.which("go") is None:
        raise BuildError("Go is not installed (https://go.dev/doc/install), and no built program is here")
    # -mod=mod lets the build itself write what go.mod and go.sum lack. Programs without cgo run on every libc.
    return run(["go", *arguments], folder, GOFLAGS="-mod=mod", GOWORK="off", CGO_ENABLED="0")


def kubernetes(version: str, name: str, target: Path) -> None:
    """Builds k8s.io/kubernetes/cmd/NAME of `version` (v1.MINOR.PATCH) to `target`. Raises BuildError.

    The module requires its staging modules at v0.0.0, which exists only inside its repository: a module around it
    replaces each by its release, which has the same minor and patch version under v0.
    """
    major, minor, patch = version.removeprefix("v").split(".")
    with tempfile.TemporaryDirectory() as folder:
        module = Path(folder, "go.mod")
        module.write_text("module hat.dev/kubernetes\n")
        own = json.loads(_go(["mod", "download", "-json", f"{MODULE}@{version}"], Path(folder)))
        required = Path(own["GoMod"]).read_text()
        language = re.search(r"^go (\S+)$", required, re.M)
        lines = [f"go {language.group(1) if language else '1.24.0'}", f"require {MODULE} {version}"]
        staging = sorted(set(re.findall(r"^\s+(k8s\.io/\S+) v0\.0\.0$", required, re.M)))
        if not staging:
            raise BuildError(f"{own['GoMod']} requires no module at v0.0.0: this way of building has changed")
        lines += [f"replace {name} => {name} v0.{minor}.{patch}" for name in staging]
        module.write_text("module hat.dev/kubernetes\n" + "\n".join(lines) + "\n")
        # Without a version of the form vX.Y.Z helm and the kubelet refuse the cluster.
        values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
        flags = ["-s", "-w"] + [
            f"-X {package}.{key}={value}"
            for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
            for key, value in values.items()
        ]
        _go(
            ["build", "-trimpath", "-ldflags", " ".join(flags), "-o", str(target), f"{MODULE}/cmd/{name}"],
            Path(folder),
        )


def helm(version: str, target: Path) -> None:
    """Builds helm of `version` (vMAJOR.MINOR.PATCH) to `target`. Raises BuildError."""
    module = f"helm.sh/helm/v{version.removeprefix('v').split('.')[0]}"
    _command(f"{module}/cmd/helm", version, f"{module}/internal/version.version", target)


def kwok(version: str, target: Path) -> None:
    """Builds kwok of `version` (vMAJOR.MINOR.PATCH) to `target`. Raises BuildError."""
    _command("sigs.k8s.io/kwok/cmd/kwok", version, "sigs.k8s.io/kwok/pkg/consts.Version", target)


def coredns(version: str, target: Path) -> None:
    """Builds CoreDNS of `version` (vMAJOR.MINOR.PATCH) to `target`. Raises BuildError."""
    module = "github.com/coredns/coredns"
    _command(module, version, f"{module}/coremain.GitCommit", target)


def _command(package: str, version: str, version_variable: str, target: Path) -> None:
    """Builds a program that needs no other version of a module than its own go.mod says."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "go.mod").write_text("module hat.dev/program\n")
        _go(["get", f"{package}@{version}"], Path(folder))
        flags = f"-s -w -X {version_variable}={version}"
        _go(["build", "-trimpath", "-ldflags", flags, "-o", str(target), package], Path(folder))
