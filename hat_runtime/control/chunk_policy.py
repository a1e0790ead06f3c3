"""How large the chunks of a prompt should be, from what is known of link, device and cloud.

balance     HAT's own (arXiv 2503.18989, section IV): a chunk's transfer takes as long as the cloud's waiting time and
            the computation of the chunk before it, X A / beta = w + g(X) / P.
predictive  the size with the least predicted time to the first token. Prediction follows the chunks through device,
            link and cloud, each of which does one at a time; the cloud runs in one pass what has arrived meanwhile.

Both stay within bounds. Sizes change only for a gain worth naming, so that noise does not move them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hat_runtime.control.chunks import chunk_ends
from hat_runtime.control.pass_cost import PassCost

BALANCE, PREDICTIVE = "balance", "predictive"
POLICIES = (BALANCE, PREDICTIVE)
FALLBACK = 128
"""Tokens of a chunk while too little is known."""
STEPS = (1.0, 1.5)
"""Candidates are these times the powers of two."""
DEAD_BAND = 0.05
"""A size is kept until another one is predicted to save more than this share of the time."""
PASS_TOKENS = 512
"""Most rows that the cloud runs at once (SchedulerConfig.max_batch_tokens)."""


@dataclass(frozen=True)
class Bounds:
    """Least and most tokens of a chunk."""

    least: int = 64
    most: int = 512

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"bounds of a chunk: 1 <= {self.least} <= {self.most} does not hold")

    def clamp(self, tokens: float) -> int:
        """The nearest size within the bounds."""
        return max(self.least, min(self.most, round(tokens)))

    def candidates(self) -> list[int]:
        """Sizes to choose from, ascending: both bounds, and a few in each octave between them."""
        found = {self.least, self.most}
        power = 1
        while power <= self.most:
            found |= {size for step in STEPS if self.least <= (size := int(power * step)) <= self.most}
            power *= 2
        return sorted(found)


@dataclass(frozen=True)
class Conditions:
    """What the time of a prompt depends on, in seconds, bytes and tokens. Whatever is 0 was not measured."""

    row_bytes: float
    """A: one shallow state on the wire."""
    uplink_bytes_per_s: float
    """beta"""
    rtt_s: float
    shallow: PassCost | None
    """Of the input submodel's passes on the device; None: not known."""
    cost: PassCost | None
    """g, of the cloud's passes; None: not known."""
    wait_s: float = 0.0
    """w: from a Step's arrival in the cloud to its pass, while the cloud is not at work on this prompt."""
    company: int = 0
    """Rows of other sessions in a pass."""
    pass_tokens: int = PASS_TOKENS
    """Most rows of a prompt in one pass."""
    downlink_bytes_per_s: float = 0.0
    head_s: float = 0.0
    """From the deep state to the first token."""

    @property
    def known(self) -> bool:
        """Whether a prediction is possible."""
        return self.uplink_bytes_per_s > 0 and self.cost is not None and self.shallow is not None

    def compute_s(self, new: int, total: int) -> float:
        """g of a pass over `new` tokens of this prompt, with others' rows beside them."""
        assert self.cost is not None
        return self.cost.seconds(new, total) + self.cost.per_token_s * self.company


def predicted_ttft(now: Conditions, start: int, total: int, chunk: int) -> float:
    """Seconds from the start of an upload to its first token.

    Args:
        now: known conditions.
        start: tokens that the cloud holds already.
        total: tokens of the text, more than `start`.
        chunk: tokens of a chunk.

    Raises:
        ValueError: the conditions are not known.
    """
    if not now.known:
        raise ValueError("the link's rate, or what passes cost the device or the cloud, is not known")
    assert now.shallow is not None
    device_s = link_s = 0.0
    arrivals: list[tuple[float, int, int]] = []
    begin = start
    for end in chunk_ends(start, total, chunk):
        new = end - begin
        device_s += now.shallow.seconds(new, end)
        link_s = max(link_s, device_s) + new * now.row_bytes / now.uplink_bytes_per_s
        arrivals.append((link_s + now.rtt_s / 2, new, end))
        begin = end
    down_s = now.row_bytes / now.downlink_bytes_per_s if now.downlink_bytes_per_s else 0.0
    return _computed_s(now, arrivals) + now.rtt_s / 2 + down_s + now.head_s


def _computed_s(now: Conditions, arrivals: Sequence[tuple[float, int, int]]) -> float:
    """When the last chunk has been computed; chunks that wait together share a pass, and a long one takes several."""
    done_s = 0.0
    index = 0
    while index < len(arrivals):
        arrived_s, left, end = arrivals[index]
        if arrived_s + now.wait_s > done_s:
            done_s = arrived_s + now.wait_s
        index += 1
        while index < len(arrivals) and arrivals[index][0] <= done_s:
            left, end = left + arrivals[index][1], arrivals[index][2]
            index += 1
        while left > 0:
            new = min(left, now.pass_tokens)
            left -= new
            done_s += now.compute_s(new, end - left)
    return done_s


def predictive(
    now: Conditions,
    start: int,
    total: int,
    bounds: Bounds,
    current: int | None = None,
    hint: int | None = None,
) -> int:
    """The size with the least predicted time; `current` if no other one saves more than DEAD_BAND of its time.

    A prompt that fits into a chunk of either size has the same time with both: the current one stays. Once the
    conditions are known, what comes out is predicted to take at most 1 / (1 - DEAD_BAND) of the least time, whatever
    the hint.

    Args:
        now: conditions; where they are not known the size is the hint, the current one, or FALLBACK.
        start: tokens that the cloud holds already.
        total: tokens of the text, more than `start`.
        bounds: of the size.
        current: the size so far, if there is one.
        hint: what somebody else proposes, who sees more devices and less of this one. It is taken where nothing is
            known, and where a size is to be chosen anyway and it is as good as the best one but for DEAD_BAND.
    """
    if not now.known:
        return bounds.clamp(hint or current or FALLBACK)
    first = hint if current is None else current
    kept = bounds.clamp(first or FALLBACK)
    others = [kept, bounds.clamp(hint)] if hint else [kept]
    times = {size: predicted_ttft(now, start, total, size) for size in [*bounds.candidates(), *others]}
    best = min(times, key=lambda size: (times[size], size))
    if first is not None and times[best] >= (1 - DEAD_BAND) * times[kept]:
        return kept
    if hint and times[best] >= (1 - DEAD_BAND) * times[bounds.clamp(hint)]:
        return bounds.clamp(hint)
    return best


def balance(
    now: Conditions,
    total: int,
    bounds: Bounds,
    current: int | None = None,
    stages: int = 1,
    hint: int | None = None,
) -> int:
    """The size of HAT's balance condition for g(X) = a + b X: X = (w + a / P) / (A / beta - b / P), within bounds.

    Where the cloud is slower than the link, the condition has no solution and the size is the largest one.

    Args:
        now: conditions; where they are not known the size is the hint, the current one, or FALLBACK.
        total: tokens of the text, which b depends on.
        bounds: of the size.
        current: the size so far, if there is one.
        stages: P, of the cloud's pipeline.
        hint: as in `predictive`; it is taken where it is within DEAD_BAND of the condition's own size.
    """
    if not now.known:
        return bounds.clamp(hint or current or FALLBACK)
    assert now.cost is not None
    fixed_s = now.wait_s + now.compute_s(0, total) / stages
    slope_s = now.row_bytes / now.uplink_bytes_per_s
    slope_s -= (now.cost.per_token_s + now.cost.per_pair_s * total) / stages
    best = bounds.most if slope_s <= 0 else bounds.clamp(fixed_s / slope_s)
    for size in (current, hint):
        if size and abs(best - bounds.clamp(size)) <= DEAD_BAND * bounds.clamp(size):
            return bounds.clamp(size)
    return best
