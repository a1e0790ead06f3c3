"""Releases of the chart in a test's cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.harness import binaries
from tests.harness.ci import skip_or_fail

CHART = Path(__file__).resolve().parents[2] / "charts" / "hat-operator"


class HelmError(Exception):
    """helm failed; the text holds its arguments and what it said."""


def find_helm() -> Path:
    """Helm, if it is on this machine: building it takes longer than a test may."""
    built = binaries.cache_folder() / binaries.HELM / "helm"
    if built.is_file():
        return built
    try:
        return binaries.find("helm")
    except binaries.MissingProgramError as error:
        skip_or_fail(str(error))


class Helm:
    """Runs helm as the administrator of one cluster, in one namespace."""

    def __init__(self, kubeconfig: Path, namespace: str, folder: Path, chart: Path = CHART) -> None:
        """`folder` holds helm's own files."""
        self.command = [str(find_helm()), "--kubeconfig", str(kubeconfig), "--namespace", namespace]
        self.environment = {**os.environ, "HOME": str(folder)}
        self.chart = chart

    def run(self, *arguments: str, timeout_s: float = 150) -> str:
        """Standard output of one command. Raises HelmError."""
        done = subprocess.run(
            [*self.command, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            raise HelmError(f"helm {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def template(self, release: str, *settings: str) -> list[dict[str, Any]]:
        """The chart's objects, hooks among them. Raises HelmError."""
        said = self.run("template", release, str(self.chart), *settings)
        return [found for found in yaml.safe_load_all(said) if found]
