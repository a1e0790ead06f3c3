"""What physics allows: lower bounds for the times that a user sees, from the link and bare compute.

A figure of ours is only worth something beside the bound for the same link and the same machines. All times are in
seconds, all sizes in bytes, lengths in tokens. The parts must be measured outside the engine and the servers whose
performance is judged (hat_runtime.model.calibrate, hat_runtime.emulation.measure).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LimitParts:
    """The parts that the bounds are made of."""

    hidden_bytes: float
    """h: one hidden state on the wire."""
    rate_up: float
    """B_u: uplink, bytes a second."""
    rate_down: float
    """B_d: downlink, bytes a second."""
    rtt: float
    """R: round-trip time of an empty message."""
    t_in: float
    """Input submodel, one token."""
    t_head: float
    """t_h: output submodel (final norm and LM head), one token."""
    t_cloud: float
    """t_c0: middle submodel, one token. Flat up to a few dozen tokens, because the weights must be read once."""
    beta: float
    """Middle submodel, seconds a token of a long prompt."""
    s: float
    """Input submodel, seconds a token of a long prompt."""
    cloud_prompts: Sequence[tuple[int, float]] = ()
    """(n, middle submodel's seconds for a prompt of n tokens) as measured, n rising; empty: from t_cloud and beta."""
    device_prompts: Sequence[tuple[int, float]] = ()
    """The same of the input submodel; empty: from s."""

    @property
    def up(self) -> float:
        """h / B_u: time of one hidden state on the uplink."""
        return self.hidden_bytes / self.rate_up

    @property
    def down(self) -> float:
        """h / B_d: time of one hidden state on the downlink."""
        return self.hidden_bytes / self.rate_down

    def cloud(self, tokens: int) -> float:
        """t_c(n) = max(t_c0, beta n): middle submodel for `tokens` tokens in one pass."""
        return max(self.t_cloud, self.beta * tokens)

    def cloud_prompt(self, tokens: int) -> float:
        """Middle submodel for a whole prompt, as measured where it was, else `cloud`."""
        return _between(self.cloud_prompts, tokens) if self.cloud_prompts else self.cloud(tokens)

    def device_prompt(self, tokens: int) -> float:
        """Input submodel for a whole prompt, as measured where it was, else s times its length."""
        return _between(self.device_prompts, tokens) if self.device_prompts else self.s * tokens


def _between(points: Sequence[tuple[int, float]], at: int) -> float:
    """The straight line between the two points around `at`; beyond the ends in proportion to the nearest point's."""
    place = bisect_left(points, (at,))
    if place == 0:
        return points[0][1]  # a short pass reads the same weights
    if place == len(points):
        return points[-1][1] * at / points[-1][0]
    (low, before), (high, after) = points[place - 1], points[place]
    return before + (after - before) * (at - low) / (high - low)


def tbt_u_shape(parts: LimitParts) -> float:
    """Time between tokens without speculation: the causal loop L1 = t_in + h/B_u + R + t_c0 + h/B_d + t_h."""
    return parts.t_in + parts.up + parts.rtt + parts.t_cloud + parts.down + parts.t_head


def ttft_unchunked(parts: LimitParts, prompt_tokens: int) -> float:
    """Time to first token when compute and transfer of the prompt do not overlap.

    S s + S h/B_u + R + t_c(S) + h/B_d + t_h
    """
    n = prompt_tokens
    compute = parts.device_prompt(n) + parts.cloud_prompt(n) + parts.t_head
    return compute + n * parts.up + parts.rtt + parts.down


def ttft_chunked_limit(parts: LimitParts, prompt_tokens: int) -> float:
    """Time to first token that no chunk size can beat: the slowest of link, cloud and device works without a gap.

    R + max(S h/B_u + t_c0, S beta, S s + h/B_u + t_c0) + h/B_d + t_h; where the times of whole prompts were measured,
    they stand for S beta and S s: chunks never need less compute than the best way to run the prompt.
    """
    n = prompt_tokens
    link = n * parts.up + parts.t_cloud
    device = parts.device_prompt(n) + parts.up + parts.t_cloud
    cloud = parts.cloud_prompt(n) if parts.cloud_prompts else n * parts.beta
    return parts.rtt + max(link, cloud, device) + parts.down + parts.t_head


def ttft_chunked(parts: LimitParts, prompt_tokens: int, chunk_tokens: int, chunk_cost: float = 0.0) -> float:
    """Predicted time to first token with chunks of `chunk_tokens`: three stages, device -> link -> cloud.

    Args:
        parts: link and compute.
        prompt_tokens: S > 0.
        chunk_tokens: c > 0; the last chunk is what remains.
        chunk_cost: omega, fixed cost of a chunk on the link.
    """
    device = link = cloud = 0.0
    for start in range(0, prompt_tokens, chunk_tokens):
        n = min(chunk_tokens, prompt_tokens - start)
        device += n * parts.s
        link = max(link, device) + chunk_cost + n * parts.up
        cloud = max(cloud, link + parts.rtt / 2) + parts.cloud(n)
    return cloud + parts.down + parts.rtt / 2 + parts.t_head


def accepted_tokens(acceptance: float, drafts: int) -> float:
    """Expected tokens of a round with `drafts` drafts and the bonus token: (1 - a^(n+1)) / (1 - a)."""
    if acceptance >= 1:
        return drafts + 1
    return (1 - acceptance ** (drafts + 1)) / (1 - acceptance)


def round_synchronous(parts: LimitParts, drafts: float, t_draft: float) -> float:
    """Time of a round in which the device drafts, sends as it drafts, and waits for the check.

    max(n t_d + h/B_u, t_d + (n+1) h/B_u) + R + t_c0 + (n+1) h/B_d + t_h

    Args:
        parts: link and compute.
        drafts: n, or its mean; 0: the plain loop, L1.
        t_draft: t_d, seconds of a draft, its input layers included.
    """
    n = drafts
    if not n:
        return tbt_u_shape(parts)
    up = max(n * t_draft + parts.up, t_draft + (n + 1) * parts.up)
    return up + parts.rtt + parts.t_cloud + (n + 1) * parts.down + parts.t_head


def tbt_synchronous(parts: LimitParts, acceptance: float, drafts: int, t_draft: float) -> float:
    """Time between tokens at `acceptance` with `drafts` drafts a round: `round_synchronous` / E(n)."""
    return round_synchronous(parts, drafts, t_draft) / accepted_tokens(acceptance, drafts)


def best_synchronous(
    parts: LimitParts, acceptance: float, t_draft: float, most_drafts: int = 32
) -> tuple[float, int]:
    """(least tbt_synchronous, its number of drafts)."""
    return min((tbt_synchronous(parts, acceptance, n, t_draft), n) for n in range(1, most_drafts + 1))


def round_bound(t_draft: float, drafts: int, rtt: float, t_verify: float) -> float:
    """Time of a round of token mode when drafting and judging overlap wholly: max(T_draft, T_RTT + T_verify).

    PicoSpec (arXiv 2603.19133), T_hit. Its own published runs reach 60 to 67 % of it.

    Args:
        t_draft: seconds of a draft.
        drafts: gamma.
        rtt: round-trip time of an empty message.
        t_verify: seconds of the target's pass over a round.
    """
    return max(drafts * t_draft, rtt + t_verify)


def pipeline_interval(parts: LimitParts, t_draft: float, cloud_batch: int = 16) -> float:
    """tau = max(t_d, h/B_u, h/B_d, t_c0/m): the pace of a full pipeline, m tokens checked in one cloud step."""
    return max(t_draft, parts.up, parts.down, parts.t_cloud / cloud_batch)


def tbt_pipelined(parts: LimitParts, acceptance: float, t_draft: float, cloud_batch: int = 16) -> float:
    """Time between tokens when drafting never waits, one branch: (1 - a) L1 + a tau.

    After a refusal the next token cannot come before a causal loop has passed; the others follow at pipeline pace.
    """
    tau = pipeline_interval(parts, t_draft, cloud_batch)
    return (1 - acceptance) * tbt_u_shape(parts) + acceptance * tau


def pipeline_window(parts: LimitParts, acceptance: float, t_draft: float, cloud_batch: int = 16) -> int:
    """Drafts in flight that are worth having: min(ceil(L1 / tau), ceil(ln .05 / ln a)), at least 1.

    The first fills the pipe; beyond the second a draft is accepted in fewer than 5 of 100 cases.
    """
    fill = math.ceil(tbt_u_shape(parts) / pipeline_interval(parts, t_draft, cloud_batch))
    if acceptance >= 1:
        return fill
    useful = 1 if acceptance <= 0.05 else math.ceil(math.log(0.05) / math.log(acceptance))
    return max(1, min(fill, useful))
