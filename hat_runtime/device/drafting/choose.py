"""From a drafter's logits to its draft, by the rules that the target's tokens are chosen by."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from hat_runtime.device.drafting.base import Draft, Proposal
from hat_runtime.device.sampling import DRAFT, SamplingParams, gumbel_noise, kept_scores, softmax


def choose(
    logits: torch.Tensor,
    ids: NDArray[np.int64],
    params: SamplingParams,
    position: int,
    source: str,
    *,
    with_proposal: bool,
    others: int = 0,
) -> Draft:
    """The draft for `position`.

    Greedy: argmax. Coupled: argmax(log q + G) with the target's own noise. With a proposal (rejection sampling): a draw
    from q with noise of its own.

    Args:
        logits: float32 [k].
        ids: token ids of the logits, [k].
        params: temperature and top_p shape q as they shape the target.
        position: absolute index of the token.
        source: the drafter's name.
        with_proposal: draw from q and keep it.
        others: how many further candidates to name, the likeliest by the same rule first.
    """
    if params.temperature == 0.0:
        best = torch.topk(logits, min(1 + others, len(logits)))
        confidence = float(torch.exp(best.values[0] - torch.logsumexp(logits, -1)))
        first, *rest = (int(ids[index]) for index in best.indices.tolist())
        return Draft(first, confidence, source, None, tuple(rest))
    kept, scores = kept_scores(logits, params)
    kept_ids, q = ids[kept], softmax(scores)
    noise = gumbel_noise(params.seed, position, kept_ids, DRAFT if with_proposal else 0)
    order = np.argsort(-(scores + noise))[: 1 + others]
    tokens = [int(kept_ids[index]) for index in order]
    proposal = Proposal(kept_ids, q) if with_proposal else None
    # Whoever chooses between drafters must not see which token was drawn: q would not be what it was drawn from.
    confidence = float(q.max() if with_proposal else q[order[0]])
    return Draft(tokens[0], confidence, source, proposal, tuple(tokens[1:]))
