"""What a pass of the cloud, or of the device's layers, costs.

Apart from its fit, which needs numpy: the operator has none.

g = c0 + c1 new + c2 new total + c3 total: `new` tokens of texts that are `total` tokens long when the pass is over.
"""

from __future__ import annotations

import math
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

    def most_new(self, seconds: float, cached: int) -> int:
        """Most new tokens, of a text that has `cached` tokens before, in a pass of so many seconds; may be 0 or less.

        The larger root of c0 + c3 (cached + n) + (c1 + c2 (cached + n)) n = seconds.
        """
        slope = self.per_token_s + self.per_pair_s * cached + self.per_cached_s
        left_s = seconds - self.fixed_s - self.per_cached_s * cached
        if left_s <= 0:
            return 0
        most = 2 * left_s / (slope + math.sqrt(slope**2 + 4 * self.per_pair_s * left_s) or math.inf)
        return min(1 << 30, int(most)) if most else 1 << 30
