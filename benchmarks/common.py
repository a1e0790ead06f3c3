"""What the benchmarks share: where prompts come from, and a report that says on what machine it was made."""

from __future__ import annotations

import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from hat_runtime.data import Prompt, read_prompts
from hat_runtime.errors import UsageError
from hat_runtime.model.prepare import prepare

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "docs" / "benchmarks"


def progress(text: str) -> None:
    """Tell whoever waits what is going on."""
    print(text, file=sys.stderr, flush=True)


def warn_if_busy() -> None:
    """Figures from a busy machine are worth nothing: two threads of one process wait for each other at every step."""
    load = os.getloadavg()[0]
    if load > 0.5:
        progress(
            f"warning: other work runs on this machine (load average {load:.1f}); the figures will be wrong"
        )


def model_folder(model: Path | None) -> Path:
    """The folder that was asked for, else the default model (prepared on first use)."""
    return model or prepare("default")


def data_prompts(file: str) -> list[Prompt]:
    """The prompts of a file in the folder HAT_DATA."""
    folder = os.environ.get("HAT_DATA")
    if not folder:
        raise UsageError(f"set HAT_DATA to the folder that holds {file} (benchmarks/fetch_data.py fills one)")
    return read_prompts(Path(folder) / file)


def bench_report_sets(
    suite: str, sets: Sequence[str], title: str, about: str, name: str, short: Sequence[str]
) -> None:
    """`hat bench` with this script's options on files of the folder HAT_DATA; writes docs/benchmarks/NAME.*.

    With --short it writes nothing, and `short` are the options.
    """
    from hat_runtime.cli.bench.command import measured
    from hat_runtime.cli.main import build_parser

    folder = os.environ.get("HAT_DATA")
    if not folder:
        raise UsageError("set HAT_DATA to the folder of the report sets (benchmarks/fetch_data.py fills one)")
    options = ["--suite", suite, *(option for option in sys.argv[1:] if option != "--short")]
    if "--short" in sys.argv:
        options += short
    for file in sets:
        options += ["--prompts", str(Path(folder) / f"{file}.jsonl")]
    warn_if_busy()
    seen_on = facts(model_folder(None))
    outcome = measured(build_parser().parse_args(["bench", *options]))
    print(outcome.markdown)
    if "--short" not in sys.argv:
        plot = f"\n\n![the same as a plot]({name}.svg)"
        outcome.write(REPORTS / f"{name}.md", report(title, about, seen_on, outcome.markdown + plot))


def one_core_each() -> tuple[frozenset[int], frozenset[int]]:
    """A processor core for the device and another for the cloud."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise UsageError(
            "this benchmark pins device and cloud to a core each, but only one core can be used here"
        )
    return frozenset({cores[0]}), frozenset({cores[1]})


def facts(
    model: Path | None, packages: Sequence[str] = ("torch", "transformers", "grpcio")
) -> dict[str, str]:
    """Model if any, machine, software, commit and command, to repeat a run by. No path of the machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    software = ", ".join(f"{name} {version(name)}" for name in packages)
    return {
        **({} if model is None else {"model": model.name}),
        "machine": f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, {platform.system()}",
        "software": f"Python {platform.python_version()}, {software}",
        "commit": _commit(),
        "command": f"`{_command()}`",
    }


def report(title: str, text: str, about: dict[str, str], body: str) -> str:
    """A Markdown page."""
    lines = "\n".join(f"- {name}: {value}" for name, value in about.items())
    return f"# {title}\n\n{text.strip()}\n\n{lines}\n\n{body.strip()}\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(10th percentile, median, 90th percentile)."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[0], statistics.median(values), tenths[-1]


def metric(base_url: str, name: str) -> float:
    """The sum of all samples of a metric at `base_url`/metrics."""
    with urllib.request.urlopen(f"{base_url}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    samples = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    if not samples:
        raise UsageError(f"{base_url}/metrics has no metric {name}")
    return sum(map(float, samples))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _command() -> str:
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    data = "HAT_DATA=... " if os.environ.get("HAT_DATA") else ""
    return data + shlex.join(words)
