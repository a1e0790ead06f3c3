"""Sessions kept open after an answer, so that the next turn sends only its new tokens."""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from hat_runtime.device.chain import common_prefix
from hat_runtime.device.drafting.base import DraftState
from hat_runtime.device.metrics import DeviceMetrics
from hat_runtime.device.recovery import Recovery
from hat_runtime.device.session import CloudSession
from hat_runtime.device.submodels import DeviceModel
from hat_runtime.errors import HatError
from hat_runtime.model.pages import PagedSequence

_DRAIN_S = 5.0


@dataclass(eq=False)
class Conversation:
    """The tokens that device and cloud hold in their KV caches for one session."""

    session: CloudSession
    sequence: PagedSequence = field(default_factory=PagedSequence)
    tokens: list[int] = field(default_factory=list)
    shallow: int = 0
    """Leading `tokens` that the device's KV cache holds for certain."""
    drafting: DraftState = field(default_factory=DraftState)
    """What the device's drafter remembers of the text."""
    _borders: list[int] = field(init=False)
    # Where the first prompt ends, its answer ends, the second prompt ends, and so on.

    def __post_init__(self) -> None:
        self._borders = [len(self.tokens)]

    @property
    def held(self) -> int:
        """Leading tokens that both sides' KV caches hold: a Step may start at any position up to it."""
        return min(len(self.tokens), self.shallow, self.session.committed)

    @property
    def borders(self) -> list[int]:
        """Positions that no Step may straddle, ascending: another codec begins there."""
        return [] if self.session.binding.one_codec else self._borders

    def decodes(self, position: int) -> bool:
        """Whether the token's state is sent in the decode codec: it was generated, and not since sent as a prompt.

        It stays so for as long as the session's KV cache may hold the state: an upload that is repeated after an
        eviction encodes every row as the first time.
        """
        return bisect_right(self._borders, position) % 2 == 1

    def continue_with(self, tokens: Sequence[int], start: int) -> None:
        """Replace what comes from position `start` on; both caches are cut there by the next pass."""
        kept = self._borders[: bisect_left(self._borders, start)]
        if len(kept) % 2:  # the cut is in an answer
            kept.append(start)
        self._borders = [*kept, len(tokens)]
        self.tokens = list(tokens)
        self.shallow = min(self.shallow, start)


class ConversationStore:
    """Idle conversations, the least recently used first; bounded."""

    def __init__(
        self,
        model: DeviceModel,
        metrics: DeviceMetrics,
        *,
        max_idle: int,
        min_reuse: int,
        recovery: Recovery,
        patience_s: float,
    ) -> None:
        """Keep at most `max_idle` conversations, and reuse one from `min_reuse` common tokens on.

        One whose connection is lost is got back by `recovery`, within `patience_s`; 0: it is dropped.
        """
        self._model = model
        self._metrics = metrics
        self._max_idle = max_idle
        self._min_reuse = min_reuse
        self._idle: OrderedDict[int, Conversation] = OrderedDict()
        self._ids = count()
        self._recovery = recovery
        self._patience_s = patience_s
        self._returning: dict[int, asyncio.Task[None]] = {}
        # By key: idle conversations whose sessions are lost, on their way back to the cloud.

    def __len__(self) -> int:
        return len(self._idle)

    @property
    def idle(self) -> list[Conversation]:
        """The idle conversations, the least recently used first."""
        return list(self._idle.values())

    async def take(self, prompt: Sequence[int]) -> tuple[Conversation, int] | None:
        """The idle conversation that shares most of its beginning with the prompt, and how many tokens to reuse.

        The last token of the prompt is never reused: its deep state is needed. None if no conversation is worth it.
        """
        while True:
            shared = {
                key: common_prefix(prompt[:-1], conversation.tokens[: conversation.held])
                for key, conversation in self._idle.items()
                if key in self._returning or conversation.session.alive
            }
            # Keys grow, so among equals the most recent wins.
            best = max(((length, key) for key, length in shared.items()), default=(0, 0))
            if best[0] < self._min_reuse:
                return None
            if (returning := self._returning.get(best[1])) is not None:
                await asyncio.wait((returning,))
                continue
            conversation = self._remove(best[1])
            # A cancelled request may have left a Step under way; its Result settles what the cloud holds.
            try:
                drained = await conversation.session.drained(_DRAIN_S)
            except BaseException:  # this request is cancelled as well
                self.put(conversation)
                raise
            if drained or conversation.session.may_resume:
                start = common_prefix(prompt[:-1], conversation.tokens[: conversation.held])
                conversation.continue_with(prompt, start)
                return conversation, start
            self.discard(conversation)

    def put(self, conversation: Conversation) -> None:
        """Keep a conversation for its next turn, and drop the least recently used beyond the bound."""
        session = conversation.session
        if (session.alive or (session.may_resume and self._patience_s)) and not session.draining:
            key = next(self._ids)
            self._idle[key] = conversation
            self._watch(key, conversation)
        else:
            self.discard(conversation)
        while len(self._idle) > self._max_idle:
            self.evict_one()
        self._metrics.sessions_idle.set(len(self._idle))

    def evict_one(self) -> bool:
        """Drop the least recently used idle conversation; False if there is none."""
        if not self._idle:
            return False
        self.discard(self._remove(next(iter(self._idle))))
        return True

    def discard(self, conversation: Conversation) -> None:
        """End a conversation on both sides."""
        conversation.session.close()
        self._model.release(conversation.sequence, conversation.drafting)

    def _remove(self, key: int) -> Conversation:
        conversation = self._idle.pop(key)
        conversation.session.on_end = conversation.session.on_drain = None
        if (returning := self._returning.pop(key, None)) is not None:
            returning.cancel()
        self._metrics.sessions_idle.set(len(self._idle))
        return conversation

    def _watch(self, key: int, conversation: Conversation) -> None:
        """Get the session back when its connection is lost; drop the conversation where that cannot be."""

        def lost() -> None:
            if conversation.session.may_resume and self._patience_s:
                self._returning[key] = asyncio.create_task(self._return(key, conversation))
            else:
                self.discard(self._remove(key))

        conversation.session.on_end = lambda _: lost()
        conversation.session.on_drain = lambda: self.discard(self._remove(key))
        if not conversation.session.alive:
            lost()

    async def _return(self, key: int, conversation: Conversation) -> None:
        try:
            session, _ = await self._recovery.replace(conversation.session, self._patience_s, anew=False)
        except HatError:
            del self._returning[key]
            self.discard(self._remove(key))
        else:
            del self._returning[key]
            conversation.session = session
            self._watch(key, conversation)

    def clear(self) -> None:
        """Drop all idle conversations."""
        while self.evict_one():
            pass
