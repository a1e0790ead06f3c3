"""Whether applying an object would change what is live. Pure.

Server-side apply itself writes nothing when nothing differs, but it is a write request each time: counted, audited
and limited like any other. A wrong "yes" here costs such a request, a wrong "no" would leave a drift.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hat_operator.quantity import canonical

_LIST_KEYS = ("name", "containerPort", "port", "mountPath", "type", "topologyKey", "uid", "ip")


def needs_apply(desired: Mapping[str, Any], live: Mapping[str, Any], manager: str) -> bool:
    """Whether a wanted field is absent or different, or a field that `manager` owns is no longer wanted."""
    wanted = {key: value for key, value in desired.items() if key != "status"}
    return not _covers(wanted, live) or not _owns_only(wanted, live, manager)


def managed_by(live: Mapping[str, Any], manager: str) -> bool:
    """Whether `manager` has applied this object before."""
    return any(entry.get("manager") == manager for entry in live["metadata"].get("managedFields", ()))


def _covers(wanted: Any, live: Any) -> bool:
    if isinstance(wanted, Mapping):
        if not isinstance(live, Mapping):
            return not wanted and live is None
        return all(_covers(value, live.get(key)) for key, value in wanted.items())
    if isinstance(wanted, list):
        if not isinstance(live, list):
            return not wanted and live is None
        return _covers_list(wanted, live)
    # The API leaves out zero values of optional fields.
    return wanted == live or (live is None and not wanted) or _same_quantity(wanted, live)


def _covers_list(wanted: list[Any], live: list[Any]) -> bool:
    if all(isinstance(item, Mapping) for item in wanted) and len(live) > len(wanted):
        # Others may add entries to a list with keys: each wanted entry needs its own counterpart.
        return all(any(_same_key(item, other) and _covers(item, other) for other in live) for item in wanted)
    return len(wanted) == len(live) and all(map(_covers, wanted, live))


def _same_key(item: Mapping[str, Any], other: Any) -> bool:
    return isinstance(other, Mapping) and all(
        item[key] == other.get(key) for key in _LIST_KEYS if key in item
    )


def _same_quantity(wanted: Any, live: Any) -> bool:
    if isinstance(wanted, bool) or isinstance(live, bool):
        return False
    try:
        return canonical(wanted) == canonical(live)
    except ValueError:
        return False


def _owns_only(wanted: Mapping[str, Any], live: Mapping[str, Any], manager: str) -> bool:
    for entry in live["metadata"].get("managedFields", ()):
        applied = entry.get("operation") == "Apply" and not entry.get("subresource")
        if entry.get("manager") == manager and applied:
            return _has_fields(entry.get("fieldsV1", {}), wanted)
    return False


def _has_fields(fields: Mapping[str, Any], wanted: Any) -> bool:
    """Whether each field of a fieldsV1 set (f:NAME, k:{KEYS}, v:VALUE) is in the wanted object."""
    for path, below in fields.items():
        if path == ".":
            continue
        mark, _, rest = path.partition(":")
        if mark == "f":
            if not isinstance(wanted, Mapping) or rest not in wanted:
                return False
            found = wanted[rest]
        elif mark == "k":
            keys = json.loads(rest)
            items = wanted if isinstance(wanted, list) else []
            # A key that is not written (protocol) has been defaulted by the API.
            matches = [item for item in items if all(item.get(key, keys[key]) == keys[key] for key in keys)]
            if not matches:
                return False
            found = matches[0]
        elif mark == "v":
            if not isinstance(wanted, list) or json.loads(rest) not in wanted:
                return False
            continue
        else:
            return False
        if below and not _has_fields(below, found):
            return False
    return True
