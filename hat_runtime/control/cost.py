"""The cloud's cost of a pass as a function of its new tokens, fitted while it runs.

t = fixed + per_token * tokens: the linear part of hat.md 5's model (WISP, arXiv 2601.11652). Least squares with
exponential forgetting, so that a change of load shows within some tens of passes.
"""

from __future__ import annotations

from dataclasses import dataclass

FORGET = 0.98
"""Weight of the past at each new observation."""


@dataclass
class LinearCost:
    """Running sums of the weighted least-squares fit."""

    weight: float = 0.0
    tokens: float = 0.0
    tokens_squared: float = 0.0
    seconds: float = 0.0
    product: float = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """Add one pass of `tokens` new tokens that took `seconds`."""
        self.weight = FORGET * self.weight + 1
        self.tokens = FORGET * self.tokens + tokens
        self.tokens_squared = FORGET * self.tokens_squared + tokens * tokens
        self.seconds = FORGET * self.seconds + seconds
        self.product = FORGET * self.product + tokens * seconds

    def fit(self) -> tuple[float, float] | None:
        """(fixed_s, per_token_s), both >= 0, or None while the passes seen differ too little in size to tell."""
        if self.weight < 4:
            return None
        mean = self.tokens / self.weight
        variance = self.tokens_squared / self.weight - mean * mean
        if variance < 1.0:
            return None
        covariance = self.product / self.weight - mean * self.seconds / self.weight
        slope = max(0.0, covariance / variance)
        return max(0.0, self.seconds / self.weight - slope * mean), slope
