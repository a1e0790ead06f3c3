"""What all dashboards are put together from: panels, variables, labels. Layout is Grafana's 24 columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "hat"
HEIGHT = 8
_CHOSEN = 'hat_namespace=~"$namespace",hat_deployment=~"$deployment"'
CLOUD = f'hat_component="cloud",{_CHOSEN}'
"""Of series that pods of the cloud's side export; the labels come from hat_operator.objects.monitor."""
CLOUD_POD = f'{CLOUD},pod=~"$pod"'
DEVICES = f'hat_component="edge",{_CHOSEN}'
"""Of series that devices export."""
DEVICE = f'{DEVICES},hat_device=~"$device"'
RECORDED = _CHOSEN
"""Of recording rules."""
OWN = 'namespace=~"$namespace",name=~"$deployment"'
"""Of series that the operator exports for single HatDeployments."""

Panel = timeseries.Panel | stat.Panel


@dataclass(frozen=True)
class Query:
    """One query of a panel; `legend` may hold {{label}}."""

    expr: str
    legend: str
    right: bool = False
    """Drawn against the axis on the right, which has the unit of the panel's `right_unit`."""
    dashed: bool = False
    """A target or a prediction."""


def graph(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    span: int = 8,
    stacked: bool = False,
    top: float | None = None,
    right_unit: str = "",
) -> timeseries.Panel:
    """Lines over time.

    Args:
        title: unique in its dashboard.
        description: what it shows, and what to make of it.
        unit: Grafana's name of the unit.
        queries: in the order of the legend.
        span: width in columns.
        stacked: areas on top of each other.
        top: largest value of the axis; None: as needed.
        right_unit: unit of the axis on the right.
    """
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .min(0)
        .span(span)
        .height(HEIGHT)
        .datasource(SOURCE)
        .line_width(1)
        .fill_opacity(25 if stacked else 5)
        .show_points(common_model.VisibilityMode.AUTO)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_model.LegendDisplayMode.LIST)
            .placement(common_model.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(common_model.TooltipDisplayMode.MULTI))
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(common_model.StackingMode.NORMAL))
    if top is not None:
        panel.max(top)
    for letter, query in zip("ABCDEFGH", queries, strict=False):
        panel.with_target(_target(query, letter))
        properties: list[tuple[str, Any]] = []
        if query.dashed:
            properties += [
                ("custom.lineStyle", {"fill": "dash", "dash": [10, 10]}),
                ("custom.fillOpacity", 0),
            ]
        if query.right:
            properties += [("custom.axisPlacement", "right"), ("unit", right_unit)]
        if properties:
            panel.override_by_query(
                letter, [model.DynamicConfigValue(id_val=name, value=value) for name, value in properties]
            )
    return panel


def number(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    span: int = 4,
    height: int = 4,
    words: str = "",
    names: bool = False,
) -> stat.Panel:
    """The latest value of each series, large.

    Args:
        title: unique in its dashboard.
        description: what it shows, and what to make of it.
        unit: Grafana's name of the unit.
        queries: in the order of their numbers.
        span: width in columns.
        height: in Grafana's rows.
        words: "ZERO|ONE" for a value that is 0 or 1; "": the value itself.
        names: the legends are shown instead of the values.
    """
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .span(span)
        .height(height)
        .datasource(SOURCE)
        .graph_mode(common_model.BigValueGraphMode.NONE if words else common_model.BigValueGraphMode.AREA)
        .color_mode(common_model.BigValueColorMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    if names:
        panel.text_mode(common_model.BigValueTextMode.NAME)
    if words:
        zero, one = words.split("|")
        options = {
            "0": model.ValueMappingResult(text=zero, index=0),
            "1": model.ValueMappingResult(text=one, index=1),
        }
        panel.mappings([model.ValueMap(options=options)])
    for letter, query in zip("ABCDEFGH", queries, strict=False):
        panel.with_target(_target(query, letter))
    return panel


def _target(query: Query, letter: str) -> prometheus.Dataquery:
    return (
        prometheus.Dataquery()
        .ref_id(letter)
        .expr(query.expr)
        .legend_format(query.legend)
        .datasource(SOURCE)
        .format(PromQueryFormat.TIME_SERIES)
        .range()
    )


def rate(metric: str, labels: str) -> str:
    """Per second, over the window that fits the panel."""
    return f"rate({metric}{{{labels}}}[$__rate_interval])"


def quantiles(metric: str, labels: str, by: str = "", shares: Sequence[float] = (0.5, 0.95)) -> list[Query]:
    """Quantiles of a histogram over all its series, or for each value of the label `by`."""
    kept = ", ".join(filter(None, (by, "le")))
    prefix = f"{{{{{by}}}}} " if by else ""
    return [
        Query(
            f"histogram_quantile({share:g}, sum by ({kept}) ({rate(f'{metric}_bucket', labels)}))",
            f"{prefix}p{100 * share:g}",
        )
        for share in shares
    ]


def mean(metric: str, labels: str, by: str) -> str:
    """Mean of a histogram's values for each value of the label `by`."""
    return (
        f"sum by ({by}) ({rate(f'{metric}_sum', labels)}) / sum by ({by}) ({rate(f'{metric}_count', labels)})"
    )


def variable(name: str, label: str, metric: str, value: str) -> dashboard.QueryVariable:
    """A choice among the values that the label `value` has in a metric; all of them at first."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(f"label_values({metric}, {value})")
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(model.VariableOption(selected=True, text="All", value="$__all"))
    )


def chosen(metric: str) -> list[dashboard.QueryVariable]:
    """Namespace and name of HatDeployments, from a metric with the monitors' labels."""
    within = f'{metric},hat_namespace=~"$namespace"'
    return [
        variable("namespace", "Namespace", f"hat_kv_cache_usage_ratio{{{metric}}}", "hat_namespace"),
        variable("deployment", "HatDeployment", f"hat_kv_cache_usage_ratio{{{within}}}", "hat_deployment"),
    ]


def board(
    name: str,
    description: str,
    variables: Sequence[dashboard.QueryVariable],
    rows: Sequence[tuple[str, Sequence[Panel]]],
) -> dashboard.Dashboard:
    """A dashboard of rows with a title each; it links to the others."""
    found = (
        dashboard.Dashboard(f"HAT / {name}")
        .uid(f"hat-{name.lower()}")
        .description(description)
        .tags([TAG])
        .editable()
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("HAT")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    for one in variables:
        found.with_variable(one)
    identity = 1
    for title, panels in rows:
        found.with_row(dashboard.Row(title).id(identity))
        identity += 1
        for panel in panels:
            found.with_panel(panel.id(identity))
            identity += 1
    return found
