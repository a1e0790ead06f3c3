"""The queries of the chart's dashboards and rules, and the metrics that they name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "hat-operator"
FOLDER = CHART / "dashboards"
RULES = CHART / "rules" / "hat.rules.yaml"
BOARDS = ("hat-fleet", "hat-device", "hat-cloud", "hat-operator")


@dataclass(frozen=True)
class Selector:
    """One vector selector: a metric's name and its label matchers as they are written."""

    metric: str
    labels: str

    @property
    def text(self) -> str:
        return f"{self.metric}{{{self.labels}}}"


def board(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def panels(name: str) -> list[dict[str, Any]]:
    """Those with data; none is inside of a row."""
    return [panel for panel in board(name)["panels"] if panel["type"] != "row"]


def queries(name: str) -> list[tuple[str, str]]:
    """(title of the panel, query) of every query of a dashboard."""
    return [(panel["title"], target["expr"]) for panel in panels(name) for target in panel["targets"]]


def filled(expr: str, **chosen: str) -> str:
    """A query as Grafana sends it with these values of the variables."""
    for name, value in {"__rate_interval": "1m", **chosen}.items():
        expr = re.sub(rf"\${name}\b", value, expr)
    assert not re.search(r"\$[a-z_]", expr), expr
    return expr


def selectors(expr: str) -> Iterator[Selector]:
    """The vector selectors of an expression that names metrics of HAT or `up`."""
    for metric, labels in re.findall(r"\b(hat[_:][\w:]*|up\b)(?:\{([^}]*)\})?", expr):
        # Labels of `by`, `on` and the like are not followed by braces, and begin like metrics.
        if metric not in ("hat_namespace", "hat_deployment", "hat_component", "hat_device"):
            yield Selector(metric, labels)


def rules() -> list[dict[str, Any]]:
    content = yaml.safe_load(RULES.read_text())
    return [rule for group in content["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}
