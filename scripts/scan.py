"""checkov over everything that HAT puts into a cluster: the rendered chart, and the objects of the examples.

Usage: python -m scripts.scan   (a check of CI; `make scan`). Needs helm. checkov's requirements conflict with the
project's, so uv runs it in an environment of its own with the versions of scripts/checkov/requirements.txt. Reasons for
checks that are left out stand in scripts/checkov/config.yaml, for single objects in their annotations checkov.io/skip.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hat_operator.render import render as render_hat
from tests.harness.binaries import MissingProgramError, find

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "scripts" / "checkov"
CHART = ROOT / "charts" / "hat-operator"
SITE = ROOT / "examples" / "hat-site.yaml"
CHARTS = {
    "chart-cluster": (
        *("--set", "replicas=2", "--set", "metrics.podMonitor=enabled"),
        *("--set", "alerts.prometheusRule=enabled"),
    ),
    "chart-namespaces": ("--set", "namespaces={team-a,team-b}"),
}
NAMESPACE = "team-a"
LIMIT_S = 280.0


class ScanError(Exception):
    """The scan cannot be made; the text is one line."""


def render(folder: Path) -> None:
    """Writes the manifests to scan into `folder`. Raises ScanError, MissingProgramError."""
    helm = find("helm")
    for name, settings in CHARTS.items():
        command = [str(helm), "template", "hat", str(CHART), "--namespace", "hat-system", *settings]
        (folder / f"{name}.yaml").write_text(_run(command))
    for example in sorted((ROOT / "examples").glob("*.yaml")):
        if example == SITE:
            (folder / SITE.name).write_text(SITE.read_text())
            continue
        body = yaml.safe_load(example.read_text())
        # The examples go where the user's kubectl points; that must not be the namespace `default`.
        body["metadata"]["namespace"] = NAMESPACE
        wanted = render_hat(yaml.safe_dump(body), example.name, "registry.example.com/hat")
        (folder / example.name).write_text(yaml.safe_dump_all([*wanted.cloud, *wanted.edge]))


def scan(folder: Path) -> Mapping[str, Any]:
    """checkov's results for the manifests in `folder`. Raises ScanError."""
    version = (FOLDER / "requirements.in").read_text().strip()
    # A cached environment; without the constraints uv would take the newest of everything that checkov needs.
    runner = [str(ROOT / "scripts" / "uv"), "tool", "run", "--python", sys.executable, "--from", version]
    runner += ["--constraints", str(FOLDER / "requirements.txt")]
    options = [
        "--directory",
        str(folder),
        "--framework",
        "kubernetes",
        "--config-file",
        str(FOLDER / "config.yaml"),
    ]
    said = _run([*runner, "checkov", *options, "--output", "json", "--soft-fail", "--skip-download"])
    found: Mapping[str, Any] = json.loads(said)
    return found


def problems(report: Mapping[str, Any]) -> list[str]:
    """A line for each failed check, each one that an object leaves out without a reason, and each unread file."""
    results = report["results"]
    found = [f"{_where(one)}: {one['check_name']}" for one in results["failed_checks"]]
    for one in results["skipped_checks"]:
        reason = one["check_result"].get("suppress_comment", "").strip()
        if len(reason) < 10:
            found.append(f"{_where(one)}: left out without a reason: {reason!r}")
    return found + [f"cannot be read: {file}" for file in results["parsing_errors"]]


def _where(record: Mapping[str, Any]) -> str:
    return f"{record['file_path'].lstrip('/')}: {record['resource']}: {record['check_id']}"


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "CHECKOV_RUN_SCA_PACKAGE_SCAN_V2": "false", "LOG_LEVEL": "ERROR"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ScanError(f"{Path(command[0]).name} took longer than {LIMIT_S:.0f} s") from None
    if done.returncode:
        words = " / ".join(done.stderr.strip().splitlines()[-3:])
        raise ScanError(f"{Path(command[0]).name} {command[1]} failed: {words}")
    return done.stdout


def main() -> int:
    """Returns 0 when nothing was found, or outside CI when there is no helm; else 1."""
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            render(folder)
            report = scan(folder)
    except MissingProgramError as error:
        print(f"scan: left out, no helm: {error}", file=sys.stderr)
        return 1 if os.environ.get("CI", "").lower() in ("1", "true") else 0
    except ScanError as error:
        print(f"scan: {error}", file=sys.stderr)
        return 1
    found = problems(report)
    for line in found:
        print(line, file=sys.stderr)
    summary = report["summary"]
    print(
        f"checkov {summary['checkov_version']}: {summary['passed']} passed, {summary['failed']} failed, "
        f"{summary['skipped']} left out with a reason, {summary['resource_count']} objects"
    )
    if not summary["passed"]:
        print("scan: checkov has looked at nothing", file=sys.stderr)
    return 1 if found or not summary["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
