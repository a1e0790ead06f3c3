"""What a pass of the cloud, or of the device's layers, costs.

Apart from its fit, which needs numpy: the operator has none.

g = c0 + c1 new + c2 new total + c3 total: `new` tokens of texts that are `total` tokens long when the pass is over.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PassCost:
    """c0, c1, c2 and c3, all at least 0, and how far off they were lately."""

    fixed_s: float
    per_token_s: float
    per_pair_s: float = 0.0
    """Seconds for each pair of a new token and a token of its text."""
    per_cached_s: float = 0.0
    """Seconds for each token of a text."""
    error: float = 0.0
    """Mean distance of the latest passes from what was predicted, as a share of it."""

    def seconds(self, new: int, total: int) -> float:
        """Duration of a pass over `new` tokens of one text, which has `total` tokens afterwards."""
        return self.fixed_s + self.per_cached_s * total + (self.per_token_s + self.per_pair_s * total) * new

    def most_new(self, seconds: float, total: int) -> int:
        """Most new tokens, of a text that has `total` afterwards, in a pass of so many seconds; may be 0 or less."""
        slope = self.per_token_s + self.per_pair_s * total
        return 1 << 30 if slope <= 0 else int((seconds - self.fixed_s - self.per_cached_s * total) / slope)
