"""How much of a cloud's time prompts may take from sessions that decode.

A session that decodes comes back with its next Step after a while, is answered by one pass, and so on: its cycle.
Prompts make it longer in two ways: rows of theirs in its own pass, and a pass of theirs that is under way when its
Step comes. So prompts ride along with others' passes, a few rows at a time, and have passes of their own only where the
others' absence is nearly long enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hat_runtime.control.pass_cost import PassCost


@dataclass(frozen=True)
class Decoder:
    """A session that decodes."""

    due_s: float
    """Until its next Step is expected, in seconds; 0 or less: it is there, or late."""
    cycle_s: float
    """From one answer to the next."""


@dataclass(frozen=True)
class Courtesy:
    """What prompts owe to sessions that decode."""

    max_stretch: float = 0.25
    """How much longer a cycle may become, as a share of it."""
    least_rows: int = 8
    """Rows of prompts that a pass has in any case, so that they come to an end."""

    def prompt_rows(
        self,
        decoders: Sequence[Decoder],
        cost: PassCost | None,
        cached: int,
        most: int,
        *,
        alone: bool,
        mixing_s: float = 0.0,
    ) -> int:
        """Most rows of prompts in the next pass.

        Args:
            decoders: all sessions that decode.
            cost: of a pass; None while it is not known.
            cached: tokens of the longest of the prompts' texts that are computed.
            most: what the pass has room for.
            alone: the pass would be the prompts' own.
            mixing_s: what a pass with both takes beyond the sum of its parts, for which the cost has no term.
        """
        if cost is None or not decoders:
            return most
        if alone:
            seconds = max(0.0, min(one.due_s for one in decoders)) + self._late_s(decoders)
        else:
            seconds = cost.fixed_s + max(0.0, self._allowed_s(decoders) - mixing_s)
        return max(min(self.least_rows, most), min(most, cost.most_new(seconds, cached)))

    def wait_s(self, decoders: Sequence[Decoder], cost: PassCost | None, cached: int) -> float:
        """How long prompts should wait for the next session that decodes, to ride along, instead of a pass now."""
        if cost is None or not decoders:
            return 0.0
        due_s = min(one.due_s for one in decoders)
        fits = cost.seconds(self.least_rows, cached + self.least_rows) <= max(0.0, due_s) + self._late_s(
            decoders
        )
        return 0.0 if fits else max(0.0, due_s)

    def _late_s(self, decoders: Sequence[Decoder]) -> float:
        """How late a pass of prompts alone may end: half, because the next pass may have prompts as well."""
        return self._allowed_s(decoders) / 2

    def _allowed_s(self, decoders: Sequence[Decoder]) -> float:
        return self.max_stretch * min(one.cycle_s for one in decoders)
