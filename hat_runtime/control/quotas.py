"""Limits for tenants and devices: what a quota file says, and what must hold of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from hat_runtime.errors import MOST_SHOWN, FieldError

MAX_NAMES = 4096
MAX_NAME = 253
MAX_SESSIONS = 1 << 20
MAX_TOKENS = 1e9


class QuotaError(FieldError):
    """A field of a quota file cannot be used: which one, its value, and what it must be."""


@dataclass(frozen=True)
class Limits:
    """What a tenant or a device may use; None: as much as there is."""

    sessions: int | None = None
    """Open sessions."""
    tokens_per_second: float | None = None
    """Rows computed a second, in the long run."""
    burst_tokens: float | None = None
    """Rows that may be computed at once after a pause; None: what two seconds give."""
    kv_share: float | None = None
    """Share of the KV pages, above 0 and at most 1."""
    weight: float = 1.0
    """Share of the cloud's time beside others that want more than there is."""

    @property
    def burst(self) -> float:
        """Rows that may be computed at once after a pause."""
        if self.burst_tokens is not None:
            return self.burst_tokens
        return math.inf if self.tokens_per_second is None else 2 * self.tokens_per_second

    def pages(self, total: int) -> int | None:
        """KV pages of `total`, at least 1; None: all."""
        return None if self.kv_share is None else max(1, int(self.kv_share * total))


@dataclass(frozen=True)
class Scope:
    """Whom limits are for: a tenant, or a device of a tenant."""

    tenant: str
    device: str | None = None
    """None: the tenant as a whole."""

    def __str__(self) -> str:
        name = self.tenant if self.device is None else self.device
        kind = "tenant" if self.device is None else "device"
        return f"{kind} {name[:MOST_SHOWN]!r}"


@dataclass(frozen=True)
class Quotas:
    """All limits. Without any nobody is limited."""

    tenant_default: Limits = Limits()
    """For each tenant that is not named, also for those that name no tenant, who are one."""
    tenants: Mapping[str, Limits] = field(default_factory=dict)
    device_default: Limits = Limits()
    """For each device that is not named; the devices of a tenant that give no name are one."""
    devices: Mapping[str, Limits] = field(default_factory=dict)

    @cached_property
    def rated(self) -> bool:
        """Whether anybody's tokens a second are limited."""
        everybody = (self.tenant_default, self.device_default, *self.tenants.values(), *self.devices.values())
        return any(limits.tokens_per_second is not None for limits in everybody)

    def tenant(self, name: str) -> Limits:
        """Limits of a tenant."""
        return self.tenants.get(name, self.tenant_default)

    def scopes(self, tenant: str, device: str) -> tuple[tuple[Scope, Limits], ...]:
        """The limits that hold for a device of a tenant: its tenant's and its own."""
        return (
            (Scope(tenant), self.tenant(tenant)),
            (Scope(tenant, device), self.devices.get(device, self.device_default)),
        )

    def max_pages(self, tenant: str, device: str, total: int) -> int:
        """Most KV pages, of `total`, that one session of a device can get."""
        return min(limits.pages(total) or total for _, limits in self.scopes(tenant, device))


def parse(content: object) -> Quotas:
    """Check what a quota file holds.

    Args:
        content: as YAML or JSON gives it; None, an empty file, limits nobody. `tenant_default` and `device_default`
            are limits, `tenants` and `devices` limits by name. What a named one does not set is the default's, and
            null means no limit.

    Raises:
        QuotaError: names the first field that is wrong and echoes its value. Fields that are not known are wrong: a
            limit with a typing error in its name would limit nobody.
    """
    root = _mapping(content if content is not None else {}, "quotas")
    _only(root, ("tenant_default", "tenants", "device_default", "devices"), "")
    of_tenants = _limits(root.get("tenant_default"), "tenant_default", Limits(), tenant=True)
    of_devices = _limits(root.get("device_default"), "device_default", Limits(), tenant=False)
    return Quotas(
        of_tenants,
        _named(root.get("tenants"), "tenants", of_tenants, tenant=True),
        of_devices,
        _named(root.get("devices"), "devices", of_devices, tenant=False),
    )


def _named(value: object, path: str, default: Limits, *, tenant: bool) -> Mapping[str, Limits]:
    found = _mapping({} if value is None else value, path)
    if len(found) > MAX_NAMES:
        raise QuotaError(path, f"{len(found)} names", f"must be at most {MAX_NAMES}")
    for name in found:
        if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME or not name.isprintable():
            reason = (
                f"must be a name of 1 to {MAX_NAME} printable characters; put other kinds of values in quotes"
            )
            raise QuotaError(path, name, reason)
    return {name: _limits(item, f"{path}.{name}", default, tenant=tenant) for name, item in found.items()}


def _limits(value: object, path: str, default: Limits, *, tenant: bool) -> Limits:
    found = _mapping({} if value is None else value, path)
    _only(found, [one.name for one in fields(Limits) if tenant or one.name != "weight"], path)
    checks = {
        "sessions": lambda name, given: _number(given, name, 0, MAX_SESSIONS, whole=True),
        "tokens_per_second": lambda name, given: _number(given, name, 0.01, MAX_TOKENS),
        "burst_tokens": lambda name, given: _number(given, name, 1, MAX_TOKENS),
        "kv_share": lambda name, given: _number(given, name, 1e-6, 1),
        "weight": lambda name, given: _number(given, name, 0.01, 100),
    }
    change: dict[str, Any] = {}
    for name, given in found.items():
        if given is None and name != "weight":
            change[name] = None
        else:
            change[name] = checks[name](f"{path}.{name}", given)
    limits = replace(default, **change)
    if limits.burst_tokens is None or limits.tokens_per_second is not None:
        return limits
    if change.get("burst_tokens") is not None:
        reason = "goes with tokens_per_second, which has no value"
        raise QuotaError(f"{path}.burst_tokens", limits.burst_tokens, reason)
    return replace(limits, burst_tokens=None)  # the default's, of a rate that is lifted


def _mapping(value: object, path: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise QuotaError(path, value, "must be a mapping of names to values")
    return value


def _only(found: Mapping[Any, Any], known: Any, path: str) -> None:
    for name in found:
        if name not in known:
            raise QuotaError(path or "quotas", name, f"is not a field; fields are {', '.join(known)}")


def _number(value: object, path: str, least: float, most: float, *, whole: bool = False) -> float:
    right = isinstance(value, int) or (isinstance(value, float) and not whole)
    if isinstance(value, bool) or not right or not least <= value <= most:  # type: ignore[operator]
        kind = "an integer" if whole else "a number"
        raise QuotaError(path, value, f"must be {kind} from {least:g} to {most:.0f}")
    return value  # type: ignore[return-value]
