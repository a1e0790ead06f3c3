"""What a Prometheus server knows of one HatDeployment: the question, and the answer in the form of /v1/devices. Pure.

Ages are taken from the server's own clock, so that no clocks of two machines are subtracted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hat_operator import answers, names
from hat_operator.answers import Report
from hat_operator.policy import CloudTuning
from hat_runtime.log import sane_device_name

CONTACT_AGE = "hat_cloud_contact_age_seconds"
DEVICE_FIGURES = {
    "hat_chunk_size_tokens": "chunk_tokens",
    "hat_link_uplink_bytes_per_second": "uplink_bytes_per_s",
    "hat_link_rtt_seconds": "rtt_s",
    "hat_shallow_token_seconds": "shallow_s_per_token",
    "hat_prompt_row_bytes": "row_bytes",
    "hat_acceptance_ratio": "acceptance",
}
"""A device's metrics, by what /v1/devices calls them."""
COST = "hat_cloud_cost_seconds"
COST_TERMS = {term: f"{term}_s" for term in ("fixed", "per_token", "per_pair", "per_cached")}
ROWS = "hat_pass_prompt_tokens"
LOAD_FIGURES = {
    "hat_step_wait_seconds": "wait_s",
    "hat_step_company_tokens": "company_tokens",
    ROWS: "prompt_rows",
}
"""The cloud's metrics, by what `load` of /v1/devices calls them."""
_WHO = ("hat_component", "hat_device", "pod", "instance")
"""Labels that tell one process from another."""
_AGE = "hat_age"
"""A label that marks an age among the values."""
LONGEST_ERROR = 200


@dataclass(frozen=True)
class Told:
    """One answer."""

    reports: list[Report] = field(default_factory=list)
    tunings: list[CloudTuning] = field(default_factory=list)
    """Of the replicas whose samples are fresh."""
    sampled: float | None = None
    """Monotonic seconds of the newest sample of a replica; None: there is none."""


def query(namespace: str, name: str) -> str:
    """PromQL for all figures of a HatDeployment and their ages, in one answer and so as of one time.

    Labels that say nothing here are dropped: they are most of an answer.
    """
    which = f'hat_namespace="{namespace}",hat_deployment="{name}"'
    figures = "|".join((CONTACT_AGE, *DEVICE_FIGURES, COST, *LOAD_FIGURES))
    # One metric of each side: those of a process are read together, and timestamp() drops their names.
    ages = f'time() - timestamp({{__name__=~"{CONTACT_AGE}|{ROWS}",{which}}})'
    return (
        f"max by (__name__, term, {_AGE}, {', '.join(_WHO)}) "
        f'({{__name__=~"{figures}",{which}}} or label_replace({ages}, "{_AGE}", "1", "", ""))'
    )


def parse(body: bytes, now: float, fresh_s: float) -> Told:
    """An answer to `query`; what is no figure is left out.

    Args:
        body: of GET /api/v1/query.
        now: monotonic seconds at which it was asked.
        fresh_s: a replica's samples that are older say nothing.

    Raises:
        ValueError: it is no such answer; the text is what the server said, or what is wrong, and short.
    """
    processes = list(_processes(body))
    devices = [row for labels, values, age in processes if (row := _device(labels, values, age)) is not None]
    clouds = [
        (age, values)
        for labels, values, age in processes
        if labels.get("hat_component") == names.CLOUD and age is not None
    ]
    youngest = min((age for age, _ in clouds), default=None)
    return Told(
        answers.reports(devices, now),
        [_tuning(values) for age, values in clouds if age <= fresh_s],
        None if youngest is None else now - youngest,
    )


def what_it_said(body: bytes) -> str:
    """The reason in a refusal of Prometheus' API; "" where there is none."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    error = content.get("error") if isinstance(content, dict) else None
    if not isinstance(error, str):
        return ""
    return "".join(char if char.isprintable() else " " for char in error[:LONGEST_ERROR])


def _processes(body: bytes) -> Iterator[tuple[Mapping[str, str], Mapping[str, float], float | None]]:
    """Labels, values by metric (cost: by term), and age in seconds of each process in an answer."""
    values: dict[tuple[str, ...], dict[str, float]] = {}
    ages: dict[tuple[str, ...], float] = {}
    for labels, value in _samples(body):
        who = tuple(labels.get(name, "") for name in _WHO)
        own = values.setdefault(who, {})
        if _AGE in labels:
            ages[who] = max(0.0, value)
        elif labels.get("__name__") == COST:
            own[labels.get("term", "")] = value
        else:
            own[labels.get("__name__", "")] = value
    for who, found in values.items():
        yield dict(zip(_WHO, who, strict=True)), found, ages.get(who)


def _samples(body: bytes) -> Iterator[tuple[Mapping[str, str], float]]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("it answers with something that is not JSON") from None
    if not isinstance(content, dict) or content.get("status") != "success":
        raise ValueError(f"it answers: {what_it_said(body) or 'without status success'}")
    data = content.get("data")
    result = data.get("result") if isinstance(data, dict) and data.get("resultType") == "vector" else None
    if not isinstance(result, list):
        raise ValueError("it answers with no vector: is this a Prometheus server?")
    for series in result:
        if not isinstance(series, dict):
            continue
        labels, sample = series.get("metric"), series.get("value")
        if not isinstance(labels, dict) or not isinstance(sample, list) or len(sample) != 2:
            continue
        try:
            value = float(sample[1])  # a string, as in "NaN"
        except (TypeError, ValueError):
            continue
        if math.isfinite(value) and all(isinstance(text, str) for text in labels.values()):
            yield labels, value


def _device(
    labels: Mapping[str, str], values: Mapping[str, float], age: float | None
) -> dict[str, Any] | None:
    """A row as /v1/devices has it; None: it is no device, or has not talked to the cloud yet."""
    name, contact = labels["hat_device"], values.get(CONTACT_AGE)
    if labels["hat_component"] != names.EDGE or sane_device_name(name) is None:
        return None
    if age is None or contact is None or contact < 0:
        return None
    row: dict[str, Any] = {"name": name, "seconds_since_contact": age + contact}
    return row | {figure: values[metric] for metric, figure in DEVICE_FIGURES.items() if values.get(metric)}


def _tuning(values: Mapping[str, float]) -> CloudTuning:
    cost = {figure: values[term] for term, figure in COST_TERMS.items() if term in values}
    load = {figure: values[metric] for metric, figure in LOAD_FIGURES.items() if metric in values}
    return answers.tuning({"cost": cost, "load": load})
