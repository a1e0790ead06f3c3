"""Runs the project's checks, the fast ones first, and says what ran and how long each took.

Usage: scripts/check.py [NAME ...]   (all of them without a name; `--list` names them)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Check:
    """One layer of checks: a command and the longest time that it may take."""

    name: str
    command: tuple[str, ...]
    limit_s: float = 300.0
    is_pytest: bool = False
    may_skip: bool = False
    """Where the machine lacks what the tests need, all of them skip (with CI=true they fail instead)."""


IN_CI = os.environ.get("CI", "").lower() in ("1", "true")
TOOLS = (
    *("etcd", "kube-apiserver", "kube-controller-manager", "kubectl", "helm"),
    *("kube-scheduler", "kwok"),  # fleets of fake nodes
    *("kubelet", "kube-proxy", "coredns"),  # real nodes
    *("prometheus", "promtool"),
)

PARALLEL = ("-n", "logical", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder")
"""A file of tests for each core at a time, up to four: most of the runtime's tests wait for a timer or a process."""

CHECKS = (
    # Elsewhere the tests that need them build them, or skip.
    *([Check("tools", (PYTHON, "-m", "tests.harness.binaries", *TOOLS), limit_s=2100)] if IN_CI else []),
    Check("format", (str(BIN / "ruff"), "format", "--check", ".")),
    Check("lint", (str(BIN / "ruff"), "check", ".")),
    Check("imports", (str(BIN / "lint-imports"), "--no-logo")),
    Check("types", (str(BIN / "mypy"),), limit_s=600),
    Check(
        "unit",
        (PYTHON, "-m", "pytest", "tests/unit", "-m", "not long", *PARALLEL),
        limit_s=600,
        is_pytest=True,
    ),
    Check(
        "runtime",
        (PYTHON, "-m", "pytest", "tests/runtime", "-m", "not long", *PARALLEL),
        limit_s=2100,
        is_pytest=True,
    ),
    Check(  # outside CI it builds a Kubernetes control plane on first use
        "operator",
        (PYTHON, "-m", "pytest", "tests/operator", "-m", "not long"),
        limit_s=2100,
        is_pytest=True,
        may_skip=True,
    ),
    Check(  # needs root, containerd and CNI plugins
        "e2e",
        (PYTHON, "-m", "pytest", "tests/e2e", "-m", "not long"),
        limit_s=1200,
        is_pytest=True,
        may_skip=True,
    ),
    Check("scan", (PYTHON, "-m", "scripts.scan"), limit_s=600),
    Check(  # needs root and buildah; the first run makes a base image and fetches wheels
        "images",
        (PYTHON, "-m", "pytest", "tests/images", "-m", "not long"),
        limit_s=1500,
        is_pytest=True,
        may_skip=True,
    ),
)


@dataclass
class Outcome:
    """How one check ended; the counts are those of its tests."""

    check: Check
    seconds: float
    problem: str = ""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    slowest: list[tuple[float, str]] = field(default_factory=list)


def environment() -> dict[str, str]:
    """The environment of every check.

    One thread a process unless the caller says otherwise: tests run several processes at once and their models are
    tiny, so torch's thread pools only take turns on the same cores.
    """
    env = dict(os.environ)
    env["PATH"] = f"{BIN}{os.pathsep}{env.get('PATH', '')}"
    env.setdefault("OMP_NUM_THREADS", "1")
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("HF_HUB_OFFLINE", "1")
    return env


@contextmanager
def process_group(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command in its own process group and leaves nothing of the group behind."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, process_group=0
    )
    try:
        yield process
    finally:
        for sign, wait_s in ((signal.SIGINT, 10.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            if process.poll() is not None:
                break
            os.killpg(process.pid, sign)
            try:
                process.wait(wait_s)
            except subprocess.TimeoutExpired:
                continue
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def read_report(outcome: Outcome, report: Path) -> None:
    """Adds the counts of a JUnit report to `outcome`."""
    if not report.exists():
        return
    for suite in ET.parse(report).getroot().iter("testsuite"):
        total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        outcome.passed += total - skipped - failed
        outcome.failed += failed
        outcome.skipped += skipped
    cases = (
        (float(case.get("time", 0)), case.get("name", ""))
        for case in ET.parse(report).getroot().iter("testcase")
    )
    outcome.slowest = sorted(cases, reverse=True)[:8]


def run(check: Check, folder: Path) -> Outcome:
    """Runs one check with its output on the terminal."""
    print(f"\n=== {check.name}: {' '.join([Path(check.command[0]).name, *check.command[1:]])}", flush=True)
    report = folder / f"{check.name}.xml"
    command = [*check.command, f"--junit-xml={report}"] if check.is_pytest else list(check.command)
    started = time.monotonic()
    problem = ""
    with process_group(command) as process:
        try:
            code = process.wait(check.limit_s)
            problem = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            problem = f"took longer than {check.limit_s:.0f} s"
    outcome = Outcome(check, time.monotonic() - started, problem)
    if check.is_pytest:
        read_report(outcome, report)
        if not problem and outcome.passed == 0 and not (check.may_skip and outcome.skipped):
            outcome.problem = "no test ran"
    return outcome


def print_summary(outcomes: list[Outcome]) -> None:
    """Prints a line per check, then pytest's counts over all of them."""
    print("\n=== summary")
    for outcome in outcomes:
        tests = f"{outcome.passed} passed, {outcome.failed} failed, {outcome.skipped} skipped"
        detail = tests if outcome.check.is_pytest else ""
        print(
            f"  {'FAILED' if outcome.problem else 'ok':<7}{outcome.check.name:<9}{outcome.seconds:7.1f} s  "
            f"{detail}{'  ' if detail and outcome.problem else ''}{outcome.problem}".rstrip()
        )
        for seconds, name in outcome.slowest:
            if seconds >= 10:
                print(f"{'':18}{seconds:7.1f} s  {name}")
    print(f"  all{'':13}{sum(outcome.seconds for outcome in outcomes):7.1f} s")
    counted = [outcome for outcome in outcomes if outcome.check.is_pytest]
    if counted:
        passed, failed, skipped = (
            sum(getattr(outcome, name) for outcome in counted) for name in ("passed", "failed", "skipped")
        )
        print(f"{passed} passed, {failed} failed, {skipped} skipped")


def main(names: list[str]) -> int:
    """Runs the named checks, or all of them. Returns 0 if all are well, 1 if not, 2 for an unknown name."""
    known = {check.name: check for check in CHECKS}
    if "--list" in names:
        print("\n".join(known))
        return 0
    if unknown := [name for name in names if name not in known]:
        print(f"check.py: no check is called {unknown[0]!r}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    # A shell's background job ignores Ctrl-C, and so would the programs that the tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcomes = [run(check, Path(folder)) for check in [known[name] for name in names] or CHECKS]
        except KeyboardInterrupt:
            print("check.py: interrupted", file=sys.stderr)
            return 130
    print_summary(outcomes)
    return 1 if any(outcome.problem for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
