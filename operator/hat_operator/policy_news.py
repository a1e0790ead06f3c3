"""Which changes of chunk sizes people are told of, and in what words. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from hat_operator.policy import Choice, differs
from hat_operator.tuning import Chunking

REASON = "ChunkSizeChanged"
EVERY_S = 30.0
"""Shortest time between two events of one HatDeployment; what changes meanwhile is told together."""
NAMED = 5
"""Devices that one event names."""
_LINK = 1.25
_ROWS = 2.0


class News:
    """What people know of the sizes of one HatDeployment.

    Args:
        known: the choices that they were told of before, by another process perhaps.
    """

    def __init__(self, known: Mapping[str, Choice] | None = None) -> None:
        self._known = dict(known or {})
        self._told: float | None = None

    def tell(self, choices: Mapping[str, Choice], rule: Chunking, now: float) -> str | None:
        """The text of an event about all large changes since the one before; None: none yet, or none at all.

        Args:
            choices: the policy's, by device. A device's first one is no change.
            rule: spec.chunking.
            now: monotonic seconds.
        """
        self._known = {name: self._known.get(name, choice) for name, choice in choices.items()}
        large = {
            name: (self._known[name], choice)
            for name, choice in choices.items()
            if differs(self._known[name].chunk, choice.chunk)
        }
        if not large or (self._told is not None and now - self._told < EVERY_S):
            return None
        self._told = now
        self._known |= {name: choice for name, (_, choice) in large.items()}
        parts = [change(name, old, new, rule) for name, (old, new) in sorted(large.items())[:NAMED]]
        if len(large) > NAMED:
            parts.append(f"and {len(large) - NAMED} other devices")
        return "; ".join(parts)


def change(device: str, old: Choice, new: Choice, rule: Chunking) -> str:
    """One device's change and its cause."""
    return f"{device}: {old.chunk} to {new.chunk} tokens ({_why(old, new, rule)})"


def _why(old: Choice, new: Choice, rule: Chunking) -> str:
    before, after = old.uplink_bytes_per_s, new.uplink_bytes_per_s
    if not rule.least <= old.chunk <= rule.most:
        return f"spec.chunking allows {rule.least} to {rule.most}"
    if before and after and not 1 / _LINK < after / before < _LINK:
        return f"link rate {_mbit(before)} -> {_mbit(after)} Mbit/s"
    if before and abs(new.company - old.company) >= _ROWS:
        return f"load {old.company:.0f} -> {new.company:.0f} rows of others in a pass"
    rate = f"link rate {_mbit(after)} Mbit/s, " if after else ""
    return f"{rate}{new.company:.0f} rows of others in a pass"


def _mbit(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8e-6:.3g}"
