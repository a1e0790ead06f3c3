"""What the cloud knows of a session: its place in the KV cache and the Steps that wait for their turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

import grpc
import torch

from hat_runtime.cloud.tokens import Decoded, Tokens, TokenState, Verdict
from hat_runtime.model.pages import PagedSequence


class Want(Enum):
    """Which deep states a Step asks for (runtime.proto, Want)."""

    NONE = 1
    LAST = 2
    ALL = 3


@dataclass(eq=False)
class StepWork:
    """One Step on its way through the engine."""

    epoch: int
    start_pos: int
    want: Want
    hidden: torch.Tensor | None
    """[n, hidden_size] on the CPU, in the compute dtype, then the alternatives; None in token mode."""
    arrived: float
    """Monotonic seconds."""
    alternatives: tuple[int, ...] = ()
    """Positions of the rows behind the n tokens (runtime.proto, Step.alternatives)."""
    done: int = 0
    """Rows that have been computed; a long Step is computed over several passes."""
    outputs: list[torch.Tensor] = field(default_factory=list)
    last_pass: float = 0.0
    """Monotonic seconds at the start of the latest pass with rows of it; 0 before the first."""
    compute_s: float = 0.0
    waited_s: float = 0.0
    """From its arrival to its answer, without the passes that it took part in."""
    batch_tokens: int = 0
    tokens: Tokens | None = None
    """Token mode: what the Step carries instead of hidden states."""

    @property
    def n(self) -> int:
        """Tokens in the Step."""
        if self.tokens is not None:
            return len(self.tokens.ids)
        assert self.hidden is not None
        return len(self.hidden) - len(self.alternatives)

    @property
    def position(self) -> int:
        """Position of the first row that is not computed yet."""
        return self.start_pos + self.done

    @property
    def left(self) -> int:
        """Rows that are not computed yet."""
        return self.n - self.done

    @property
    def decodes(self) -> bool:
        """It is part of an answer, drafts to be judged or the latest token; the others are a prompt's."""
        if self.tokens is not None:
            return self.n == 1 or self.tokens.drafts > 0
        return self.n == 1 or self.want is Want.ALL

    @cached_property
    def finite(self) -> bool:
        """No value is NaN or infinite. Looked at once, however many passes the Step waits for."""
        return self.hidden is None or bool(torch.isfinite(self.hidden).all())


@dataclass(frozen=True)
class StepDone:
    """The answer to one Step. `deep` is None for want NONE and for a stale Step."""

    work: StepWork
    deep: torch.Tensor | None = None
    stale: bool = False
    verdict: Verdict | None = None
    """Token mode, want LAST."""


@dataclass(frozen=True)
class Evicted:
    """The session's KV cache was given to others, down to `committed` tokens."""

    committed: int


@dataclass(frozen=True)
class Failed:
    """The stream ends with this status; the session's pages are free already."""

    code: grpc.StatusCode
    text: str
    retry_after_s: float | None = None


@dataclass(frozen=True)
class Ready:
    """The session is open, or was taken over, with so many tokens in its KV cache. Its stream's first event."""

    committed: int


Event = StepDone | Evicted | Failed | Decoded | Ready


def unknown_session(session_id: str) -> Failed:
    """What a resume gets that finds no session, or one of another peer: both alike, so that nobody can tell."""
    return Failed(grpc.StatusCode.NOT_FOUND, f"session {session_id!r} is unknown, or is kept no longer")


@dataclass(eq=False)
class Session:
    """One generation session. Only the engine's thread touches it after `Engine.open`."""

    id: str
    max_tokens: int
    deliver: Callable[[Event], None]
    """Takes the session's events; called on the event loop's thread. Another one after a resume."""
    tenant: str = ""
    """Whose shares of passes and of the KV cache it uses."""
    device: str = ""
    sequence: PagedSequence = field(default_factory=PagedSequence)
    queue: deque[StepWork] = field(default_factory=deque)
    epoch: int = 0
    """Highest epoch that has arrived: queued Steps of an older one are stale."""
    lost_pages: bool = False
    """Evicted, and the device's upload from `committed` has not arrived yet: what comes before it is stale."""
    evictions: int = 0
    """Times that its pages were taken while it was active; the scheduler counts them."""
    idle_evictions: int = 0
    """Times that they were taken while it was idle."""
    starved: bool = False
    """Waited for pages in the last pass, so it goes first in the next."""
    passed_over: int = 0
    """Passes in a row in which a prompt's Step might have had rows, and none of its tenant had any."""
    answered: float = 0.0
    """Monotonic seconds of the latest answer with deep states."""
    away_s: float | None = None
    """From an answer to the device's next Step, moving average; None before the first."""
    last_active: float = 0.0
    """Monotonic seconds of the last arrival or answer."""
    lost: float | None = None
    """Monotonic seconds when its stream was lost; None while it has one."""
    tokens: TokenState = field(default_factory=TokenState)
    """Token mode only."""

    def part(self) -> None:
        """Its stream is gone, or another one takes over: what was under way is of no effect, and epochs begin anew."""
        self.queue.clear()
        self.epoch, self.answered = 0, 0.0
        self.starved = self.lost_pages = False
        self.passed_over = 0
        self.tokens = TokenState()

    def note_return(self, work: StepWork) -> None:
        """A Step has arrived: learn how long the device takes from an answer to the next Step of the same text.

        A prompt comes after somebody has thought about it, which says nothing of the device.
        """
        if self.answered and not self.queue:
            away_s = work.arrived - self.answered
            if work.decodes:
                self.away_s = away_s if self.away_s is None else 0.8 * self.away_s + 0.2 * away_s
            self.answered = 0.0

    @property
    def committed(self) -> int:
        """Tokens in the KV cache."""
        return self.sequence.length


def violation(session: Session, work: StepWork, committed: int) -> Failed | None:
    """What is wrong with a Step that would run when the session has `committed` tokens; None if nothing is."""
    rows = work.n + len(work.alternatives)
    if work.start_pos > committed:
        return Failed(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"Step.start_pos={work.start_pos} jumps forward: {committed} tokens are committed",
        )
    if work.start_pos + rows > session.max_tokens:
        alternatives = f" + {len(work.alternatives)} alternatives" if work.alternatives else ""
        return Failed(
            grpc.StatusCode.OUT_OF_RANGE,
            f"Step.start_pos={work.start_pos} + n={work.n}{alternatives} is beyond the session's "
            f"{session.max_tokens} tokens",
        )
    if not work.finite:
        return Failed(grpc.StatusCode.INVALID_ARGUMENT, "Step.payload holds a value that is not finite")
    return None
