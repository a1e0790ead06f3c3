"""What the cloud's pods answer to GET /v1/devices (docs/operations.md). Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hat_operator import figures
from hat_operator.figures import Figures
from hat_operator.policy import CloudTuning, DeviceSeen
from hat_runtime.control.pass_cost import PassCost
from hat_runtime.log import sane_device_name

MAX_ROWS = 4096
STALE_S = 600.0
"""A device that no pod has heard for so long says nothing about now."""


@dataclass(frozen=True)
class Report:
    """What one pod knows of one device."""

    device: str
    contact: float
    """Monotonic seconds of this process: the age that the pod gave, taken from the time of its answer."""
    figures: Figures
    seen: DeviceSeen = field(default_factory=DeviceSeen)


@dataclass(frozen=True)
class Said:
    """One answer."""

    reports: list[Report] = field(default_factory=list)
    tuning: CloudTuning = field(default_factory=CloudTuning)
    policy_version: int | None = None
    """Of the chunk policy in effect; None: a pod of an earlier version, which takes none."""


def parse(body: bytes, now: float) -> Said:
    """An answer; rows and figures that are none are left out.

    Raises:
        ValueError: it is no such answer at all.
    """
    content = json.loads(body)
    rows = content.get("devices") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise ValueError("an object with a list `devices` is missing")
    return Said(reports(rows, now), tuning(content), _policy_version(content))


def parse_policy(body: bytes) -> Said:
    """An answer to GET /v1/policy, of which only the version counts.

    Raises:
        ValueError: it is no object.
    """
    content = json.loads(body)
    if not isinstance(content, dict):
        raise ValueError("it is no policy")
    return Said(policy_version=_policy_version({"policy_version": content.get("version")}))


def reports(rows: Sequence[Any], now: float) -> list[Report]:
    """The rows that are devices and were heard lately, as /v1/devices has them; `now` in monotonic seconds."""
    found = []
    for row in rows[:MAX_ROWS]:
        name, age = (
            (row.get("name"), row.get("seconds_since_contact")) if isinstance(row, dict) else (None, None)
        )
        if not isinstance(name, str) or sane_device_name(name) is None:
            continue
        if isinstance(age, int | float) and 0 <= age <= STALE_S:
            found.append(Report(name, now - age, figures.from_report(row), _seen(row)))
    return found


def _policy_version(content: Mapping[str, Any]) -> int | None:
    version = content.get("policy_version")
    return version if isinstance(version, int) and not isinstance(version, bool) and version >= 0 else None


def newest(reports: Iterable[Iterable[Report]], now: float) -> dict[str, Report]:
    """Each device's report by the pod that heard it last; a device without figures or contact is left out."""
    latest: dict[str, Report] = {}
    for of_pod in reports:
        for report in of_pod:
            known = latest.get(report.device)
            if (
                report.figures
                and now - report.contact <= STALE_S
                and (known is None or report.contact > known.contact)
            ):
                latest[report.device] = report
    return latest


def _seen(row: Mapping[str, Any]) -> DeviceSeen:
    return DeviceSeen(
        uplink_bytes_per_s=_number(row, "uplink_bytes_per_s"),
        rtt_s=_number(row, "rtt_s"),
        shallow_s_per_token=_number(row, "shallow_s_per_token"),
        row_bytes=_number(row, "row_bytes"),
        chunk_tokens=int(min(_number(row, "chunk_tokens"), 2**31)),
    )


def tuning(content: Mapping[str, Any]) -> CloudTuning:
    """Cost and load of a replica, from the objects `cost` and `load` of /v1/devices; what is no figure is not known."""
    load = content.get("load")
    load = load if isinstance(load, dict) else {}
    rows = int(min(_number(load, "prompt_rows"), 2**31))
    found = CloudTuning(_cost(content), _number(load, "wait_s"), _number(load, "company_tokens"))
    return CloudTuning(found.cost, found.wait_s, found.company, rows or found.prompt_rows)


def _cost(content: Mapping[str, Any]) -> PassCost | None:
    cost = content.get("cost")
    if not isinstance(cost, dict):
        return None
    found = PassCost(
        _number(cost, "fixed_s"),
        _number(cost, "per_token_s"),
        _number(cost, "per_pair_s"),
        _number(cost, "per_cached_s"),
    )
    return found if found.per_token_s > 0 or found.per_pair_s > 0 else None


def _number(found: Mapping[str, Any], key: str) -> float:
    """A number above 0, or 0 for whatever else is there."""
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0.0
    return float(value) if 0 < value < math.inf else 0.0
