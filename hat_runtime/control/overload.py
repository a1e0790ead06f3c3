"""Whether a cloud has time for one more session, and when it may have."""

from __future__ import annotations

from dataclasses import dataclass

from hat_runtime.control.pass_cost import PassCost

PAST = 0.9
"""Weight of the past at each session that ends."""
LEAST_RETRY_S = 1.0
MOST_RETRY_S = 60.0


@dataclass(frozen=True)
class Talking:
    """The sessions that are not idle, and what their Steps are like."""

    sessions: int
    rows: float
    """Of a Step that decodes."""
    tokens: float
    """Of a text."""
    slow_step_s: float = 0.0
    """What slow Steps take from their arrival to their answer, as seen lately; 0: not known."""
    stretch: float = 1.0
    """The same in Steps of the model, with those that talked then; 1: not known."""


def step_s(cost: PassCost | None, talking: Talking, sessions: int) -> float:
    """Predicted duration of a Step while `sessions` talk: that of a pass with a Step of each; 0 without a cost."""
    if cost is None:
        return 0.0
    of_one = cost.per_cached_s * talking.tokens + talking.rows * (
        cost.per_token_s + cost.per_pair_s * talking.tokens
    )
    return cost.fixed_s + sessions * of_one


def too_slow_s(cost: PassCost | None, talking: Talking, target_s: float, kept: int = 0) -> float | None:
    """How long slow Steps would take with one session more, in seconds, if that is beyond the target; else None.

    The model tells what one more costs, for any number of sessions; what it does not know of, prompts and other work on
    the machine, is in how far slow Steps were beyond it. Where nobody talks, one may.

    Args:
        cost: of a pass; None: not known, then what was seen counts alone.
        talking: the sessions now.
        target_s: what slow Steps may take.
        kept: places for others that will come.
    """
    if talking.sessions + kept < 1:
        return None
    expected_s = step_s(cost, talking, talking.sessions + kept + 1) * max(1.0, talking.stretch)
    if cost is None:
        expected_s = talking.slow_step_s
    return expected_s if expected_s > target_s else None


class Stays:
    """How long sessions talk, and so when a place gets free."""

    def __init__(self) -> None:
        self._mean_s: float | None = None

    def ended(self, talked_s: float) -> None:
        """A session has talked for so long."""
        old = self._mean_s
        self._mean_s = talked_s if old is None else PAST * old + (1 - PAST) * talked_s

    def wait_s(self, places: int, before: int) -> float | None:
        """Expected wait for one of so many places, with `before` others in front; None: not known.

        Sessions end at a rate of places / mean stay.
        """
        return None if self._mean_s is None else (before + 1) * self._mean_s / max(1, places)

    def retry_s(self, places: int, before: int) -> float:
        """When to try again: the expected wait within bounds; the least where nothing is known."""
        return min(MOST_RETRY_S, max(LEAST_RETRY_S, self.wait_s(places, before) or 0.0))
