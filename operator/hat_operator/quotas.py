"""spec.cloud.quotas: limits for tenants and devices, as the file that `hat cloud serve --quotas` follows. Pure."""

from __future__ import annotations

import json
from typing import Any

from hat_operator.fields import Fields, SpecError
from hat_runtime.control.quotas import QuotaError, parse

_NUMBERS = {
    "tokensPerSecond": "tokens_per_second",
    "burstTokens": "burst_tokens",
    "kvShare": "kv_share",
    "weight": "weight",
}
_MAY_BE_LIFTED = ("sessions", "tokensPerSecond", "kvShare")
_IN_FILE = {
    **_NUMBERS,
    "sessions": "sessions",
    "tenantDefault": "tenant_default",
    "tenants": "tenants",
    "deviceDefault": "device_default",
    "devices": "devices",
}
"""Names of fields in the spec and in the file."""
_IN_SPEC = {theirs: ours for ours, theirs in _IN_FILE.items()}


def quota_file(fields: Fields) -> str:
    """The quota file, in JSON, that says the same as spec.cloud.quotas.

    Raises:
        SpecError: a replica would not take it; the error names the field of the spec.
    """
    content: dict[str, Any] = {}
    for kind in ("tenant", "device"):
        default = fields.optional(f"{kind}Default")
        if default is not None:
            content[_IN_FILE[f"{kind}Default"]] = _limits(default)
        named: dict[str, Any] = {}
        for item in fields.items(f"{kind}s"):
            name = item.text("name")
            if name in named:
                raise SpecError(f"{item.path}.name", name, f"another of {kind}s has this name")
            named[name] = _limits(item)
        if named:
            content[f"{kind}s"] = named
    try:
        parse(content)
    except QuotaError as error:
        way = ".".join(_IN_SPEC.get(step, step) for step in error.path.split("."))
        reason = error.reason.replace("tokens_per_second", "tokensPerSecond")
        raise SpecError(f"{fields.path}.{way}", error.value, reason) from error
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _limits(fields: Fields) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in fields.texts("unlimited"):
        if name not in _MAY_BE_LIFTED:
            raise SpecError(f"{fields.path}.unlimited", name, f"must be one of {', '.join(_MAY_BE_LIFTED)}")
        if fields.has(name):
            raise SpecError(
                f"{fields.path}.{name}", fields.value[name], "is in unlimited too; remove one of both"
            )
        found[_IN_FILE[name]] = None
    if fields.has("sessions"):
        found["sessions"] = fields.number("sessions")
    return found | {theirs: fields.decimal(ours) for ours, theirs in _NUMBERS.items() if fields.has(ours)}
