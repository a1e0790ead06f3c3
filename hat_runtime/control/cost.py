"""What a pass of the cloud costs, fitted while it runs.

g(new, total) = c0 + c1 new + c2 new total: `new` tokens whose texts are `total` tokens long when the pass is over. A
pass over several texts sums both terms over them. The form is that of WISP (arXiv 2601.11652) without its term for the
bytes of the cache, which those passes cannot tell from c2.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FORGET = 0.98
"""Weight of the past at each new observation: a change of load shows within some tens of passes."""
TRUSTED = 3.0
"""An observation that is further away than so many usual distances counts as if it were that far (Huber)."""
REFIT = 4
"""Observations between two fits."""
FEWEST = 4.0
"""Observations before anything is said."""
_UNITS = np.array([1.0, 128.0, 128.0 * 1024.0])
"""Of the three terms, so that they are of one size."""


@dataclass(frozen=True)
class PassCost:
    """c0, c1 and c2, all at least 0, and how far off they were lately."""

    fixed_s: float
    per_token_s: float
    per_pair_s: float = 0.0
    """Seconds for each pair of a new token and a token of its text."""
    error: float = 0.0
    """Mean distance of the latest passes from what was predicted, as a share of it."""

    def seconds(self, new: int, total: int) -> float:
        """Duration of a pass over `new` tokens of one text, which has `total` tokens afterwards."""
        return self.fixed_s + self.per_token_s * new + self.per_pair_s * new * total

    def most_new(self, seconds: float, total: int) -> int:
        """Most new tokens, of a text that has `total` afterwards, in a pass of so many seconds; may be 0 or less."""
        slope = self.per_token_s + self.per_pair_s * total
        return 1 << 30 if slope <= 0 else int((seconds - self.fixed_s) / slope)


class CostFit:
    """Weighted least squares with exponential forgetting; outliers count less."""

    def __init__(self) -> None:
        self._gram = np.zeros((3, 3))
        self._moment = np.zeros(3)
        self._scale = 0.0
        """Usual distance of a pass from what was predicted, in seconds."""
        self._error = 0.0
        self._seen = 0
        self._fit: PassCost | None = None

    def observe(self, new: int, pairs: float, seconds: float) -> None:
        """Add one pass.

        Args:
            new: new tokens of all texts.
            pairs: sum over the texts of new x total tokens; 0 where it is not known.
            seconds: the pass took.
        """
        terms: NDArray[np.float64] = np.array([1.0, new, pairs]) / _UNITS
        weight = 1.0
        if self._fit is not None:
            predicted = self._predicted(self._fit, terms)
            away = abs(seconds - predicted)
            usual = max(self._scale, 0.01 * predicted)
            weight = min(1.0, TRUSTED * usual / away) if away else 1.0
            # What is far away moves the usual distance little at a time, but if it stays it becomes the usual one.
            self._scale = 0.9 * self._scale + 0.1 * min(away, 2 * TRUSTED * usual)
            self._error = 0.9 * self._error + 0.1 * min(1.0, away / max(predicted, 1e-9))
        self._gram = FORGET * self._gram + weight * np.outer(terms, terms)
        self._moment = FORGET * self._moment + weight * seconds * terms
        self._seen += 1
        if self._fit is None or self._seen % REFIT == 0:
            self._fit = self._solve()

    def fit(self) -> PassCost | None:
        """The cost, or None while the passes seen are too few, or differ too little in size, to tell."""
        return self._fit

    @staticmethod
    def _predicted(fit: PassCost, terms: NDArray[np.float64]) -> float:
        return float(np.array([fit.fixed_s, fit.per_token_s, fit.per_pair_s]) * _UNITS @ terms)

    def _solve(self) -> PassCost | None:
        weight, mean = self._gram[0, 0], self._gram[0, 1] / max(self._gram[0, 0], 1e-12)
        if weight < FEWEST * FORGET**FEWEST or self._gram[1, 1] / weight - mean**2 < 1.0 / _UNITS[1] ** 2:
            return None
        best, least = None, np.inf
        # Three terms: all subsets are tried, and the best one without a negative cost is kept.
        for kept in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):
            index = np.ix_(kept, kept)
            if np.linalg.cond(self._gram[index]) > 1e10:
                continue
            part = np.linalg.solve(self._gram[index], self._moment[list(kept)])
            if (part < 0).any():
                continue
            found = np.zeros(3)
            found[list(kept)] = part
            loss = float(found @ self._gram @ found - 2 * found @ self._moment)
            if loss < least:
                best, least = found, loss
        if best is None:
            return None
        fixed, per_token, per_pair = (best / _UNITS).tolist()
        return PassCost(fixed, per_token, per_pair, self._error)
