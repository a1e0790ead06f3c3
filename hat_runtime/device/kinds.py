"""How each token of an answer came about: guessed on the device, or given by the target."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hat_runtime.device.jobs import Turn

ACCEPTED = "accepted"
"""A draft that the target agreed with."""
ALTERNATIVE = "alternative"
"""In place of a draft, another candidate that was checked along with it."""
CORRECTED = "corrected"
"""The target's own token in place of a draft that it refused."""
PLAIN = "plain"
"""The target's own token where no draft was: behind the drafts of a round, or without any."""

UNCHECKED = "unchecked"
"""The small model's own token, while the cloud is away and nobody checks it (offline.py)."""

KINDS = (ACCEPTED, ALTERNATIVE, CORRECTED, PLAIN, UNCHECKED)


def kinds_of(turn: Turn) -> list[str]:
    """The kinds of a round's certain tokens, in their order."""
    accepted = sum(right for _, right in turn.judged)
    kinds = [ACCEPTED] * accepted
    if turn.refused:
        kinds.append(ALTERNATIVE if turn.alternative else CORRECTED)
    return kinds + [PLAIN] * (len(turn.tokens) - len(kinds))
