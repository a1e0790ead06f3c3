"""Choosing the next token: greedy, or coupled sampling.

Coupled sampling is the Gumbel-max trick (Gumbel 1954) with noise that depends on nothing but (seed, position, token
id): argmax(log p + G) is an exact draw from p, and two models that share the seed tend to draw the same token
(Daliri, Musco and Suresh, arXiv 2408.07978). The text is a function of the target model and the seed: batch, chunk
size, drafter and link cannot change it.

The noise comes from an integer counter hash, never from torch.Generator, which differs between CPU and CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hat_runtime.errors import UsageError

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_POSITION = 0xD1342543DE82EF95  # odd, so that positions map to distinct keys
_STREAM = 0xA0761D6478BD642F
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

DRAFT, ACCEPT, RESIDUAL = 1, 2, 3
"""Streams of noise for rejection sampling: drafting, the accept test, drawing what replaces a refused draft."""

_COLDEST = 1e-200
"""Colder is as this: any float32 logit over it is a float64 and the likeliest token wins, where less would overflow."""

_NUCLEUS_GUESS = 256
"""Candidates tried first for top_p: sorting a whole vocabulary costs more than the layers of a small model."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Any integer is a seed; its low 64 bits count."""

    temperature: float = 0.0
    """0 is greedy; 1 samples the model's own distribution."""
    top_p: float = 1.0
    """Keep only the most likely tokens that together have at least this probability."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise UsageError(f"temperature is {self.temperature}, but must be between 0 and 100")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top_p is {self.top_p}, but must be above 0 and at most 1")


def sample(logits: torch.Tensor, params: SamplingParams, position: int) -> int:
    """The token at `position` (absolute: the prompt's first token is 0) for logits float32 [vocabulary]."""
    if params.temperature == 0.0:
        return int(logits.argmax())
    ids, scores = kept_scores(logits, params)
    return int(ids[(scores + gumbel_noise(params.seed, position, ids)).argmax()])


def kept_scores(
    logits: torch.Tensor, params: SamplingParams
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """What temperature and top_p leave of logits float32 [n]: indices, and log-probabilities up to a constant.

    Args:
        logits: of a vocabulary, or of a part of one.
        params: temperature > 0.
    """
    scores = logits.detach().to("cpu", torch.float64).numpy() / max(params.temperature, _COLDEST)
    if params.top_p < 1.0:
        ids = nucleus(scores, params.top_p)
        return ids, scores[ids]
    return np.arange(len(scores), dtype=np.int64), scores


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities [n] of log-probabilities up to a constant."""
    odds = np.exp(scores - scores.max())
    result: NDArray[np.float64] = odds / odds.sum()
    return result


def probabilities(logits: torch.Tensor, params: SamplingParams) -> NDArray[np.float64]:
    """The distribution that `sample` draws from: float64 [vocabulary], sums to 1, zero outside of top_p.

    Args:
        logits: float32 [vocabulary].
        params: temperature > 0.
    """
    ids, scores = kept_scores(logits, params)
    result = np.zeros(len(logits))
    result[ids] = softmax(scores)
    return result


def uniform(seed: int, position: int, index: int = 0) -> float:
    """A uniform draw in (0, 1) from the hash of (seed, position, index)."""
    x = _mix(_mix(_mix(seed + _GOLDEN) ^ (position * _POSITION)) + (index + 1) * _GOLDEN)
    return ((x >> 12) + 0.5) * 2.0**-52


def stream_seed(seed: int, stream: int) -> int:
    """A seed whose noise is independent of that of `seed`: 64 bits, another for each number `stream` > 0."""
    return _mix(_mix(seed + _GOLDEN) + stream * _POSITION)


def nucleus(scores: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Ids of the smallest set of most likely tokens whose probability is at least top_p, likeliest first.

    Among equal scores the lower id comes first (Holtzman et al., arXiv 1904.09751).

    Args:
        scores: log-probabilities up to a constant, [vocabulary].
        top_p: 0 < top_p <= 1.
    """
    weights = np.exp(scores - scores.max())
    target = top_p * weights.sum()
    if len(scores) > _NUCLEUS_GUESS:
        # By value, not by rank: tied scores at the border are all candidates, so the order stays defined.
        border = np.partition(weights, -_NUCLEUS_GUESS)[-_NUCLEUS_GUESS]
        candidates = np.flatnonzero(weights >= border)
    else:
        candidates = np.arange(len(scores))
    if weights[candidates].sum() < target:
        candidates = np.arange(len(scores))
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    reached = np.cumsum(weights[order]) >= target
    count = int(reached.argmax()) + 1 if reached.any() else len(order)
    return order[:count].astype(np.int64)


def gumbel_noise(seed: int, position: int, ids: NDArray[np.int64], stream: int = 0) -> NDArray[np.float64]:
    """Standard Gumbel noise -log(-log(u)) of each token id, from the hash of (seed, position, id).

    Streams are independent of each other; 0 is the one that the target's tokens are drawn with.
    """
    noise: NDArray[np.float64] = -np.log(-np.log(uniform_noise(seed, position, ids, stream)))
    return noise


def uniform_noise(seed: int, position: int, ids: NDArray[np.int64], stream: int = 0) -> NDArray[np.float64]:
    """Uniform numbers in (0, 1) of each token id, from the hash of (seed, position, id).

    The hash is splitmix64 (Steele, Lea and Flood 2014) in counter mode, keyed by two rounds over seed and position.
    """
    key = _mix(_mix(seed + _GOLDEN) ^ (position * _POSITION) ^ (stream * _STREAM))
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        x = ids.astype(np.uint64)
        x += np.uint64(1)
        x *= np.uint64(_GOLDEN)
        x += np.uint64(key)
        x ^= x >> np.uint64(30)
        x *= np.uint64(_MIX_1)
        x ^= x >> np.uint64(27)
        x *= np.uint64(_MIX_2)
        x ^= x >> np.uint64(31)
    # 52 bits and a half: an odd multiple of 2**-53, exact in float64 and never 0 or 1.
    uniform: NDArray[np.float64] = ((x >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return uniform


def _mix(x: int) -> int:
    """The finaliser of splitmix64 on one integer, modulo 2**64."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)
