"""What a pass of the cloud costs, fitted while it runs.

g = c0 + c1 new + c2 new total + c3 total: `new` tokens of texts that are `total` tokens long when the pass is over.
Over several texts all terms but the first are summed. The form is that of WISP (arXiv 2601.11652): c3 is what it costs
to read the cache of a text, however few its new tokens are.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from hat_runtime.control.pass_cost import PassCost

FORGET = 0.9
"""Weight of the past at each new observation of like passes."""
TRUSTED = 3.0
"""An observation that is further away than so many usual distances counts as if it were that far (Huber)."""
REFIT = 16
"""Observations between two fits."""
ALIKE = 0.95
"""Squared cosine of two terms over the passes seen, from which on they are not told apart."""
FEWEST = 4
"""Observations before anything is said."""
_UNITS = np.array([1.0, 128.0, 128.0 * 1024.0, 1024.0])
"""Of the terms, so that they are of one size."""
_TERMS = len(_UNITS)


class CostFit:
    """Weighted least squares over kinds of passes: outliers count less, and the past of a kind fades as it comes again.

    Kinds are sizes of passes, in octaves. Each remembers its own latest passes: an hour of decoding does not wash away
    what a prompt costs.
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[int, int], tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        self._scale = 0.0
        """Usual distance of a pass from what was predicted, in seconds."""
        self._error = 0.0
        self._seen = 0
        self._fit: PassCost | None = None

    def observe(self, new: int, pairs: float, seconds: float, cached: float = 0.0) -> None:
        """Add one pass.

        Args:
            new: new tokens of all texts.
            pairs: sum over the texts of new x total tokens; 0 where it is not known.
            seconds: the pass took.
            cached: sum over the texts of their total tokens; 0 where it is not known.
        """
        terms: NDArray[np.float64] = np.array([1.0, new, pairs, cached]) / _UNITS
        weight = 1.0
        if self._fit is not None:
            predicted = self._predicted(self._fit, terms)
            away = abs(seconds - predicted)
            usual = max(self._scale, 0.01 * predicted)
            weight = min(1.0, TRUSTED * usual / away) if away else 1.0
            # What is far away moves the usual distance little at a time, but if it stays it becomes the usual one.
            self._scale = 0.9 * self._scale + 0.1 * min(away, 2 * TRUSTED * usual)
            self._error = 0.9 * self._error + 0.1 * min(1.0, away / max(predicted, 1e-9))
        kind = (new.bit_length(), int(cached).bit_length())
        gram, moment = self._kinds.get(kind, (np.zeros((_TERMS, _TERMS)), np.zeros(_TERMS)))
        # Relative errors: a pass of 20 ms tells as much as one of 2 s.
        weight /= max(seconds, 1e-6) ** 2
        self._kinds[kind] = (
            FORGET * gram + weight * np.outer(terms, terms),
            FORGET * moment + weight * seconds * terms,
        )
        self._seen += 1
        if self._fit is None or self._seen % REFIT == 0:
            self._fit = self._solve()

    def fit(self) -> PassCost | None:
        """The cost, or None while the passes seen are too few, or all of one size."""
        return self._fit

    def predicted_s(self, new: int, pairs: float, cached: float = 0.0) -> float | None:
        """What the fit says of a pass, in seconds; arguments as in `observe`. None while there is no fit."""
        if self._fit is None:
            return None
        return self._predicted(self._fit, np.array([1.0, new, pairs, cached]) / _UNITS)

    @staticmethod
    def _predicted(fit: PassCost, terms: NDArray[np.float64]) -> float:
        costs = np.array([fit.fixed_s, fit.per_token_s, fit.per_pair_s, fit.per_cached_s])
        return float(costs * _UNITS @ terms)

    def _solve(self) -> PassCost | None:
        if self._seen < FEWEST or len({new for new, _ in self._kinds}) < 2:
            return self._fit
        gram = np.sum([gram for gram, _ in self._kinds.values()], axis=0)
        moment = np.sum([moment for _, moment in self._kinds.values()], axis=0)
        best, least = None, np.inf
        # Texts of one length cannot tell what longer ones cost: then all is put down to the simpler term.
        told = [0, 1, *(term for term, simpler in ((2, 1), (3, 0)) if not _alike(gram, term, simpler))]
        # Few terms: all subsets are tried, and the best one without a negative cost is kept.
        subsets = (itertools.combinations(told, n) for n in range(1, len(told) + 1))
        for kept in map(list, itertools.chain.from_iterable(subsets)):
            index = np.ix_(kept, kept)
            if np.linalg.cond(gram[index]) > 1e10:
                continue
            part = np.linalg.solve(gram[index], moment[kept])
            if (part < 0).any():
                continue
            found = np.zeros(_TERMS)
            found[kept] = part
            loss = float(found @ gram @ found - 2 * found @ moment)
            if loss < least:
                best, least = found, loss
        if best is None:
            return self._fit
        fixed, per_token, per_pair, per_cached = (best / _UNITS).tolist()
        return PassCost(fixed, per_token, per_pair, per_cached, self._error)


def _alike(gram: NDArray[np.float64], term: int, simpler: int) -> bool:
    """Whether a term has been nearly a multiple of a simpler one in all passes."""
    return bool(gram[term, simpler] ** 2 > ALIKE * gram[term, term] * gram[simpler, simpler])
