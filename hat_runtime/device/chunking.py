"""How a device cuts prompts: the fast loop over hat_runtime.control.chunk_policy (design.md 7).

Everything that a size depends on is measured by the device or said by the cloud, so it works without anybody's help.
What the cloud proposes (Result.suggested_chunk, from an operator's slow loop) is a start while too little is known and
breaks ties after that; a wrong proposal costs at most the policy's dead band.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hat_runtime.control.chunk_policy import (
    BALANCE,
    PASS_TOKENS,
    POLICIES,
    PREDICTIVE,
    Bounds,
    Conditions,
    balance,
    predicted_ttft,
    predictive,
)
from hat_runtime.control.drafting import average
from hat_runtime.control.pass_cost import PassCost
from hat_runtime.device.estimates import CloudView
from hat_runtime.device.steps import Binding
from hat_runtime.errors import UsageError

LINK_CHANGE = 0.3
"""A link that is so much faster or slower than before is worth another size in the middle of a prompt."""


@dataclass(frozen=True)
class ChunkConfig:
    """How prompts are cut."""

    tokens: int | None = None
    """Tokens of every chunk, 0: prompts are not cut; None: as `policy` says."""
    policy: str = PREDICTIVE
    bounds: Bounds = field(default_factory=Bounds)
    """Of the sizes that `policy` chooses."""

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 0:
            raise UsageError(f"--chunk-tokens {self.tokens}: must be auto or 0 or more")
        if self.policy not in POLICIES:
            raise UsageError(f"--chunk-policy {self.policy!r}: must be one of {', '.join(POLICIES)}")


class Chunker:
    """Chooses the chunks of all prompts of a device. For the event loop's thread."""

    def __init__(self, config: ChunkConfig, link: CloudView, binding: Binding) -> None:
        self.config = config
        self._link = link
        self._binding = binding
        self._current: int | None = None
        self._rate = 0.0
        """The link's when the size was chosen."""
        self._rest_s = 0.0
        """Part of the time to the first token that no prediction has: head, sampling, queues on the device."""

    def size(self, start: int, total: int, shallow: PassCost | None, *, first: bool = True) -> int:
        """Tokens of the next chunk; 0: all that is left.

        Args:
            start: tokens that the cloud holds, or that are on their way.
            total: tokens of the text.
            shallow: cost of the input submodel's passes; None: not known.
            first: it is the upload's first chunk. The others are of the same size, unless the link has changed since.
        """
        if self.config.tokens is not None:
            return self.config.tokens
        now, bounds, hint = self.conditions(shallow), self.config.bounds, self._link.suggested_chunk or None
        changed = abs(now.uplink_bytes_per_s - self._rate) > LINK_CHANGE * self._rate
        if self._current is not None and not first and not changed and now.known:
            return self._current
        self._rate = now.uplink_bytes_per_s
        if self.config.policy == BALANCE:
            self._current = balance(now, total, bounds, self._current, hint=hint)
        else:
            self._current = predictive(now, start, total, bounds, self._current, hint)
        return self._current

    def predicted_s(self, start: int, total: int, chunk: int, shallow: PassCost | None) -> float | None:
        """Time to the first token with chunks of `chunk` tokens, 0 for the whole text; None while it is not known."""
        now = self.conditions(shallow)
        return predicted_ttft(now, start, total, chunk or total) + self._rest_s if now.known else None

    def saw_ttft(self, predicted_s: float | None, measured_s: float) -> None:
        """A prompt's first token has come."""
        if predicted_s is not None:
            rest_s = measured_s - (predicted_s - self._rest_s)
            # Half of it at most: what is far off is no constant that was left out.
            self._rest_s = average(self._rest_s, min(max(0.0, rest_s), measured_s / 2))

    def conditions(self, shallow: PassCost | None) -> Conditions:
        """What is known now."""
        link, hints = self._link, self._link.cloud_cost
        known = hints.per_token_s > 0 or hints.per_pair_s > 0
        cost = (
            PassCost(hints.fixed_s, hints.per_token_s, hints.per_pair_s, hints.per_cached_s)
            if known
            else None
        )
        row_bytes = self._binding.encoding(False).row_bytes(self._binding.hidden_size, self._binding.dtype)
        return Conditions(
            row_bytes=row_bytes,
            uplink_bytes_per_s=link.estimate.uplink_bytes_per_s,
            rtt_s=link.estimate.rtt_s,
            shallow=shallow,
            cost=cost,
            wait_s=link.cloud_wait_s,
            company=round(link.company),
            pass_tokens=hints.prompt_rows or PASS_TOKENS,
        )
