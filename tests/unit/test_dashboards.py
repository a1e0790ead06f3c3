"""The chart's dashboards: made by their generator, complete, and about metrics that exist."""

from __future__ import annotations

import json
import re
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from starlette.applications import Starlette

from hat_operator import gauges, metrics
from hat_operator.objects.monitor import relabelings
from hat_runtime.cloud.metrics import CloudMetrics
from hat_runtime.device.api.middleware import RequestScope
from hat_runtime.device.metrics import DeviceMetrics
from hat_runtime.security.folder import TlsFolder
from hat_runtime.security.metrics import measure_expiry
from hat_runtime.security.pki import Authority
from scripts.dashboards.__main__ import FOLDER, files
from tests.harness import boards

EVERY_BOARD = pytest.mark.parametrize("name", boards.BOARDS)


def exported(registry: CollectorRegistry, prefix: str = "hat_") -> set[str]:
    """Names of the samples that a registry's metrics have, or will have once their labels are known."""
    ends = {
        "counter": ("_total",),
        "histogram": ("_bucket", "_count", "_sum"),
        "info": ("_info",),
        "gauge": ("",),
    }
    return {
        family.name + end
        for family in registry.collect()
        if family.name.startswith(prefix)
        for end in ends[family.type]
    }


def sides() -> dict[str, set[str]]:
    cloud, device = CollectorRegistry(), CollectorRegistry()
    CloudMetrics(cloud)
    DeviceMetrics(device)
    RequestScope(Starlette(), device)
    assert gauges.DEVICES
    assert metrics.WRITES
    authority = Authority.create("hat.internal")
    with tempfile.TemporaryDirectory() as folder:
        for kind, registry in (("cloud", cloud), ("device", device)):
            place = Path(folder) / kind
            authority.issue("team", kind, "one").save(place)
            measure_expiry(TlsFolder(place, kind), registry)
        return {"cloud": exported(cloud), "edge": exported(device), "": exported(REGISTRY, "hat_operator_")}


SIDES = sides()


def unknown(expr: str) -> list[str]:
    """Metrics in an expression that the pods which it asks do not export."""
    wrong = []
    for selector in boards.selectors(expr):
        side = re.search(r'hat_component="(\w+)"', selector.labels)
        both = SIDES["cloud"] & SIDES["edge"]
        there = (SIDES[side.group(1)] if side else SIDES[""] | both) | boards.recorded() | {"up"}
        if selector.metric not in there:
            wrong.append(selector.text)
    return wrong


def test_files_are_those_of_the_generator() -> None:
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert there == files(), "run `make dashboards`"
    assert set(there) == {f"{name}.json" for name in boards.BOARDS}


@EVERY_BOARD
def test_every_metric_is_exported_by_the_side_that_is_asked(name: str) -> None:
    found = {title: unknown(expr) for title, expr in boards.queries(name)}
    assert {title: wrong for title, wrong in found.items() if wrong} == {}
    variables = [one["query"] for one in boards.board(name)["templating"]["list"] if one["type"] == "query"]
    assert [unknown(query) for query in variables if unknown(query)] == []


def test_rules_are_about_metrics_that_exist() -> None:
    assert {rule.get("alert", rule.get("record")): unknown(rule["expr"]) for rule in boards.rules()} == {
        rule.get("alert", rule.get("record")): [] for rule in boards.rules()
    }


def test_a_renamed_metric_is_noticed() -> None:
    assert unknown('rate(hat_batch_rows_bucket{hat_component="cloud"}[5m])')
    assert unknown('hat_generation_tokens_total{hat_component="cloud"}')
    assert unknown("hat_generation_tokens_total")
    assert not unknown('hat_generation_tokens_total{hat_component="edge"}')


def test_labels_of_queries_are_those_that_the_monitors_add() -> None:
    added = {one["targetLabel"] for side in ("cloud", "edge") for one in relabelings(side)}
    text = "".join(path.read_text() for path in FOLDER.iterdir()) + boards.RULES.read_text()
    used = set(re.findall(r"\bhat_(?:namespace|deployment|component|device)\b", text))
    assert used == added


@EVERY_BOARD
def test_every_panel_is_described(name: str) -> None:
    panels = boards.panels(name)
    assert len({panel["title"] for panel in panels}) == len(panels) > 5
    for panel in panels:
        defaults: dict[str, Any] = panel["fieldConfig"]["defaults"]
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["description"][-1] in ".)", panel["title"]
        assert defaults["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        legends = [target["legendFormat"] for target in panel["targets"]]
        assert all(legends), panel["title"]
        assert len(set(legends)) == len(legends), panel["title"]
    identities = [panel["id"] for panel in boards.board(name)["panels"]]
    assert len(set(identities)) == len(identities)


@EVERY_BOARD
def test_the_source_is_a_variable(name: str) -> None:
    board = boards.board(name)
    (source,) = (one for one in board["templating"]["list"] if one["type"] == "datasource")
    assert (source["name"], source["query"]) == ("datasource", "prometheus")
    asked = [panel["datasource"] for panel in boards.panels(name)]
    asked += [target["datasource"] for panel in boards.panels(name) for target in panel["targets"]]
    asked += [one["datasource"] for one in board["templating"]["list"] if one["type"] == "query"]
    assert {json.dumps(one, sort_keys=True) for one in asked} == {
        '{"type": "prometheus", "uid": "${datasource}"}'
    }


@EVERY_BOARD
def test_variables_are_used_and_known(name: str) -> None:
    variables = {one["name"]: one for one in boards.board(name)["templating"]["list"]}
    text = " ".join(expr for _, expr in boards.queries(name))
    used = set(re.findall(r"\$([a-z_]\w*)", text)) - {"__rate_interval"}
    assert used == set(variables) - {"datasource"}
    # A window of its own would be empty where Prometheus scrapes seldom, or blur where it scrapes often.
    assert set(re.findall(r"rate\([^()]*\[([^\]]+)\]", text)) == {"$__rate_interval"}


@EVERY_BOARD
def test_no_panel_lies_over_another(name: str) -> None:
    def cells(panel: dict[str, Any]) -> tuple[range, range]:
        at = panel["gridPos"]
        return range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])

    def meet(one: range, other: range) -> bool:
        return one.start < other.stop and other.start < one.stop

    everything = boards.board(name)["panels"]
    assert all(cells(panel)[0].stop <= 24 and panel["gridPos"]["h"] for panel in everything)
    for one, other in combinations(everything, 2):
        over = all(meet(a, b) for a, b in zip(cells(one), cells(other), strict=True))
        assert not over, (one["title"], other["title"])
