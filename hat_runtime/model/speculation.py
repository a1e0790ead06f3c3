"""Separate rejection sampling: the draft's distribution Q is on the device, the target's P in the cloud.

Thinning is exact: a draft x ~ Q is accepted with probability min(1, P(x)/Q(x)) (Leviathan et al., arXiv 2211.17192),
and after a refusal independent draws y ~ P are thinned: the first that survives with probability max(0, 1 - Q(y)/P(y))
is distributed as norm(max(0, P - Q)), because P(y) (1 - Q(y)/P(y)) = max(0, P(y) - Q(y)). A draw and its P(y) are 8
bytes, where the whole of P would be a vocabulary of floats.

Top-K is the lossy rule of PicoSpec (arXiv 2603.19133): norm(max(0, P - Q)) over the K likeliest tokens of P only. The
distance of a token's distribution to P is rho_K = sum over x outside of TopK(P) of max(0, P(x) - Q(x)).

All randomness comes from the counter hash of hat_runtime.model.sampling, in streams of their own: what a position
needs is independent of what the positions before it used, and a resent Step is judged as before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hat_runtime.model.sampling import stream_seed, uniform

COUPLED, THINNING, TOPK = "coupled", "thinning", "topk"
SAMPLERS = (COUPLED, THINNING, TOPK)

TOP_K = 10
"""The paper's K."""
DRAWS = 16
"""Draws that answer a refusal; they all fail in (1 - beta)^16 of cases, beta = total variation of P and Q."""

DRAFT_STREAM = 1
"""Stream of the noise that drafts are drawn with, where it must not be the target's."""
_ACCEPT, _DRAW, _THIN, _RESIDUAL = 2, 3, 4, 5


@dataclass(frozen=True)
class Weighted:
    """Tokens with the target's probability of each."""

    ids: list[int]
    probabilities: list[float]


def accepts(p: float, q: float, seed: int, position: int) -> bool:
    """Whether a draft with target probability p, drawn with probability q > 0, stands: min(1, p/q) of cases."""
    return uniform(stream_seed(seed, _ACCEPT), position) * q < p


def draws(p: NDArray[np.float64], seed: int, position: int, attempt: int = 0, count: int = DRAWS) -> Weighted:
    """Independent draws from p.

    Args:
        p: the target's distribution [vocabulary].
        seed: of the request.
        position: of the token to be drawn.
        attempt: 0 at the refusal; others are independent.
        count: M.
    """
    own = stream_seed(seed, _DRAW)
    points = np.array([uniform(own, position, attempt * count + i) for i in range(count)])
    cumulated = np.cumsum(p)
    ids = np.searchsorted(cumulated, points * cumulated[-1], side="right").clip(max=len(p) - 1)
    return Weighted([int(i) for i in ids], [float(p[i]) for i in ids])


def thin(offered: Weighted, q: NDArray[np.float64], seed: int, position: int, attempt: int = 0) -> int | None:
    """The first of the target's draws that survives; None if none does.

    Args:
        offered: from `draws`, of the same attempt.
        q: the draft's distribution [vocabulary] at the refused position.
        seed: of the request.
        position: of the token to be drawn.
        attempt: as for `draws`.
    """
    own = stream_seed(seed, _THIN)
    for index, (token, p) in enumerate(zip(offered.ids, offered.probabilities, strict=True)):
        if uniform(own, position, attempt * len(offered.ids) + index) * p < p - q[token]:
            return token
    return None


def top_k(p: NDArray[np.float64], k: int = TOP_K) -> Weighted:
    """The k likeliest tokens, likeliest first; those of probability 0 are left out."""
    order = np.argsort(-p, kind="stable")[:k]
    kept = [int(i) for i in order if p[i] > 0]
    return Weighted(kept, [float(p[i]) for i in kept])


def residual_of_top_k(offered: Weighted, q: NDArray[np.float64], seed: int, position: int) -> int:
    """A draw from norm(max(0, P - Q)) over the offered tokens; from P over them where Q is above P everywhere."""
    p = np.array(offered.probabilities)
    weights = np.maximum(0.0, p - q[offered.ids])
    if not weights.any():
        weights = p
    cumulated = np.cumsum(weights)
    point = uniform(stream_seed(seed, _RESIDUAL), position) * cumulated[-1]
    return offered.ids[int(np.searchsorted(cumulated, point, side="right").clip(max=len(p) - 1))]


def top_k_bound(probabilities: Iterable[float]) -> float:
    """1 - mass(TopK): an upper bound of the total variation that Top-K adds at a position."""
    return max(0.0, 1.0 - sum(probabilities))
