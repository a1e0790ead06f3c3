"""The documents name what there is: metrics, commands, files, links."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry

from hat_operator import gauges
from hat_operator import metrics as operator_metrics
from hat_runtime.cli.main import build_parser
from hat_runtime.cloud.metrics import CloudMetrics
from hat_runtime.device.metrics import DeviceMetrics

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def documented_metrics() -> set[str]:
    """The `hat_...` names of docs/operations.md; `_x` after one stands for its own first words and x."""
    names: set[str] = set()
    for line in (ROOT / "docs/operations.md").read_text().splitlines():
        first = ""
        for name in re.findall(r"`(hat_\w+|_\w+)(?:\{[^`]*\})?`", line):
            if name.startswith("hat_"):
                first = name
                names.add(name)
            else:
                names.update(first[: cut.start()] + name for cut in re.finditer("_", first))
    return names


@pytest.mark.parametrize("metrics", [CloudMetrics, DeviceMetrics])
def test_every_metric_is_documented(metrics: type[CloudMetrics] | type[DeviceMetrics]) -> None:
    registry = CollectorRegistry()
    metrics(registry)
    exported = {
        family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        for family in registry.collect()
    }
    assert exported - documented_metrics() == set()


def test_every_metric_of_the_operator_is_documented() -> None:
    assert gauges.DEVICES
    assert operator_metrics.WRITES
    exported = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in REGISTRY.collect()
        if family.name.startswith("hat_operator_")
    }
    assert len(exported) > 8
    assert exported - documented_metrics() == set()


def commands(parser: argparse.ArgumentParser, prefix: str = "hat") -> Iterator[str]:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in below:
        for name, sub in action.choices.items():
            yield from commands(sub, f"{prefix} {name}")
    if not below:
        yield prefix


def test_every_command_has_an_example() -> None:
    usage = (ROOT / "docs/usage.md").read_text()
    assert [command for command in commands(build_parser()) if f"\n    {command}" not in usage] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_files_exist(document: Path) -> None:
    text = document.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []
    files = re.findall(r"`((?:hat_runtime|benchmarks|tests|scripts|docs)/[\w./-]+\.\w+)`", text)
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_modules_of_the_architecture_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    modules = re.findall(
        r"`((?:cli|cloud|control|device|emulation|model|proto|security|wire)/[\w./]*)`", text
    )
    assert [module for module in modules if not (ROOT / "hat_runtime" / module).exists()] == []
