"""Which drafts the target accepts, and the token that follows them.

Greedy and coupled: the target chooses its own token (sampling.py), and a draft is accepted if it is the same one, so
the text is that of the target alone. Rejection (Leviathan et al., arXiv 2211.17192, algorithm 1): a draft x ~ q is
accepted with probability min(1, p(x) / q(x)), and replaced by a draw from norm(max(0, p - q)) otherwise: more drafts
are accepted, and the text is distributed as the target's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hat_runtime.device.drafting.base import Draft, Proposal, certain
from hat_runtime.device.sampling import (
    ACCEPT,
    RESIDUAL,
    SamplingParams,
    gumbel_noise,
    kept_scores,
    sample,
    softmax,
    uniform_noise,
)

COUPLED, REJECTION = "coupled", "rejection"
SAMPLERS = (COUPLED, REJECTION)


@dataclass(frozen=True)
class Verdict:
    """What the target says of some drafts."""

    tokens: list[int]
    """Certain tokens: accepted drafts, then, unless the text or the rows end, the target's own."""
    accepted: int
    """How many of the drafts were."""
    refused: bool
    """The last token replaces a draft."""


def judge(
    logits: torch.Tensor,
    drafts: Sequence[Draft],
    params: SamplingParams,
    position: int,
    *,
    sampler: str,
    stop_ids: frozenset[int],
    most: int,
) -> Verdict:
    """Check drafts against the target.

    Args:
        logits: float32 [n, vocabulary], the target's for positions position, position + 1, ...
        drafts: what was guessed for these positions; those beyond `n` are not judged, and may be none at all.
        params: how tokens are chosen.
        position: absolute index of the first token that is decided.
        sampler: "coupled" or "rejection".
        stop_ids: a token of these ends the text.
        most: tokens that the text may still grow by, at least 1.
    """
    rejecting = sampler == REJECTION and params.temperature > 0
    # One reduction for all rows: greedy decoding needs nothing else.
    greedy = logits.argmax(-1).tolist() if params.temperature == 0 else []
    tokens: list[int] = []
    for row in range(len(logits)):
        draft = drafts[row] if row < len(drafts) else None
        if greedy:
            token = greedy[row]
        elif rejecting:
            token = _accept_or_replace(logits[row], draft, params, position + row)
        else:
            token = sample(logits[row], params, position + row)
        tokens.append(token)
        wrong = draft is not None and token != draft.token
        if draft is None or wrong or token in stop_ids or len(tokens) == most:
            accepted = len(tokens) - (draft is None or wrong)
            return Verdict(tokens, accepted, wrong)
    return Verdict(tokens, len(tokens), False)


def _accept_or_replace(
    logits: torch.Tensor, draft: Draft | None, params: SamplingParams, position: int
) -> int:
    ids, p = distribution(logits, params)
    if draft is None:
        return _draw(ids, p, params.seed, position, 0)
    proposal = draft.proposal or certain(draft.token)
    u = uniform_noise(params.seed, position, np.zeros(1, np.int64), ACCEPT)[0]
    found = np.flatnonzero(ids == draft.token)
    p_draft = float(p[found[0]]) if len(found) else 0.0
    if u * proposal.of(draft.token) < p_draft:
        return draft.token
    return _draw(ids, residual(ids, p, proposal), params.seed, position, RESIDUAL)


def distribution(
    logits: torch.Tensor, params: SamplingParams
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Token ids and probabilities that the parameters leave of logits float32 [vocabulary], for temperature > 0."""
    ids, scores = kept_scores(logits, params)
    return ids, softmax(scores)


def residual(ids: NDArray[np.int64], p: NDArray[np.float64], proposal: Proposal) -> NDArray[np.float64]:
    """max(0, p - q) on `ids`, not normalised. p itself where nothing is left of it: p = q, up to rounding."""
    q = np.zeros(int(max(ids.max(), proposal.ids.max())) + 1)
    q[proposal.ids] = proposal.q
    left = np.maximum(0.0, p - q[ids])
    return left if left.sum() > 0 else p


def _draw(ids: NDArray[np.int64], weights: NDArray[np.float64], seed: int, position: int, stream: int) -> int:
    """One id with probability proportional to its weight (Gumbel-max)."""
    with np.errstate(divide="ignore"):
        scores = np.log(weights)
    return int(ids[(scores + gumbel_noise(seed, position, ids, stream)).argmax()])
