"""What a caller asks of the generator, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass, field

from hat_runtime.device.kinds import PLAIN
from hat_runtime.device.sampling import SamplingParams

STOP, LENGTH, CANCELLED, ERROR = "stop", "length", "cancelled", "error"


@dataclass(frozen=True)
class TokenEvent:
    """One generated token."""

    token_id: int
    index: int
    """0 for the first generated token."""
    time_s: float
    """time.monotonic() of its sampling."""
    kind: str = PLAIN
    """How it came about, see kinds.py."""
    more: bool = False
    """Others follow at once, that became known with it and are counted in the request's stats already."""


@dataclass
class GenerationStats:
    """Figures of one request; complete when its iterator has ended."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens taken over from an earlier turn: neither computed nor sent again."""
    ttft_s: float = 0.0
    """From the call to the first token; 0 if there was none."""
    tbt_s: float = 0.0
    """Mean time between the tokens so far; 0 with fewer than two."""
    uplink_bytes: int = 0
    """gRPC message bytes sent to the cloud; HTTP/2 framing is not included."""
    downlink_bytes: int = 0
    rounds: int = 0
    """Steps for which the cloud sent deep states back."""
    draft_tokens: int = 0
    """Tokens that the device guessed."""
    accepted_tokens: int = 0
    """How many of them the target agreed with."""
    alternatives: int = 0
    """Other candidates for guessed tokens that were checked along with them."""
    alternatives_accepted: int = 0
    """How many of them the target said in a guess's place."""
    refusals: int = 0
    """Rounds in which the target put another token in a guess's place."""
    finish_reason: str = ""
    """"stop", "length", "cancelled" or "error"."""
    chunk_tokens: int = 0
    """Tokens of a prompt chunk, the last one chosen; 0: the prompt went in one Step."""
    predicted_ttft_s: float | None = None
    """What the time to the first token was expected to be; None: too little was known."""
    cloud_compute_s: float = 0.0
    """Sum over the Steps, in the cloud's own clock. Steps that shared a pass count it each."""
    cloud_queue_s: float = 0.0
    resumes: int = 0
    """Times that the cloud was lost and the answer went on."""
    offline: bool = False
    """The small model answered alone, because the cloud was away."""
    evictions: int = 0
    """Times that the cloud gave the KV cache or the session away and the device uploaded again."""


@dataclass
class GenerationRequest:
    """One text to be continued."""

    prompt_ids: list[int]
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the text; the one that did is part of the output."""
    request_id: str = ""
    """The same in the logs of device and cloud."""
    chunk_tokens: int | None = None
    """Tokens of a prompt chunk; None: the device's default, 0: the whole prompt in one Step."""
    stats: GenerationStats = field(default_factory=GenerationStats)
    """Filled in by the generator."""
