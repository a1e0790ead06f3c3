"""Which devices the cloud is to refuse: those that the spec names, and those that have left the fleet. Pure.

A device that leaves still has a certificate, for a day at most; until then it is on the list. Who belonged to the
fleet is kept beside the list, in the same ConfigMap: a process that starts knows who has left meanwhile.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hat_operator.identity import who
from hat_operator.objects.replica_files import DENIED
from hat_operator.settings import Settings
from hat_operator.spec import HatDeployment
from hat_runtime.errors import UsageError
from hat_runtime.security.denied import MAX_ENTRIES, DenyList, parse

log = logging.getLogger(__name__)
FLEET_KEY = "fleet.json"
KEPT_S = 25 * 3600.0
"""Longer than the life of a certificate."""
REASON = "DevicesDenied"


@dataclass(frozen=True)
class Denials:
    """Of one HatDeployment."""

    listed: DenyList = field(default_factory=DenyList)
    fleet: frozenset[str] = frozenset()
    """Devices that the selector matched last."""
    left: Mapping[str, float] = field(default_factory=dict)
    """Those that it matched before, and when they were gone (Unix seconds)."""

    @classmethod
    def read(cls, data: Mapping[str, str]) -> Denials:
        """What a ConfigMap holds; what cannot be read there counts as empty, and is written anew."""
        try:
            content: Any = json.loads(data.get(FLEET_KEY) or "{}")
            fleet = frozenset(map(str, content.get("fleet", ())))
            left = {str(name): float(at) for name, at in content.get("left", {}).items()}
            return cls(parse(data.get(DENIED.key) or DenyList().to_json()), fleet, left)
        except (ValueError, TypeError, AttributeError, UsageError) as error:
            log.warning("a deny-list cannot be read and is written anew: %s", error)
            return cls()

    def data(self) -> dict[str, str]:
        """Of the ConfigMap."""
        fleet = {"fleet": sorted(self.fleet), "left": dict(sorted(self.left.items()))}
        return {DENIED.key: self.listed.to_json(), FLEET_KEY: json.dumps(fleet, separators=(",", ":"))}

    def next(
        self, hat: HatDeployment, settings: Settings, nodes: Iterable[str] | None, now: float, least: int = 0
    ) -> Denials:
        """The state at this moment.

        Args:
            hat: names devices to refuse.
            settings: have the trust domain.
            nodes: that the device selector matches now; None: not known, then nobody has left.
            now: Unix seconds.
            least: the least version that replaces what every pod of the cloud has.
        """
        fleet = self.fleet if nodes is None else frozenset(nodes)
        left = {name: at for name, at in self.left.items() if now - at < KEPT_S and name not in fleet}
        left |= dict.fromkeys(self.fleet - fleet, now)
        refused = sorted(hat.spec.security.denied) + sorted(left, key=lambda name: -left[name])
        chosen = frozenset(who.device(hat, settings, name) for name in refused[:MAX_ENTRIES])
        listed = self.listed
        if chosen != listed.identities or listed.serials or listed.version < least:
            listed = DenyList(max(listed.version + 1, least), chosen)
        return replace(self, listed=listed, fleet=fleet, left=left)


def news(old: DenyList, new: DenyList) -> str | None:
    """What an event says of a change; None where nobody is refused who was not."""
    added = sorted(identity.name for identity in new.identities - old.identities)
    if not added:
        return None
    shown = ", ".join(added[:20]) + (f" and {len(added) - 20} more" if len(added) > 20 else "")
    return f"refused by the cloud from now on: {shown}"
