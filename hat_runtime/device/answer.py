"""One request under way: uploads, rounds, and what to do when the cloud gives the KV cache or the session away."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

import torch

from hat_runtime.control.chunks import chunk_ends, cut_at
from hat_runtime.device.conversations import Conversation, ConversationStore
from hat_runtime.device.link import CloudLink
from hat_runtime.device.request import GenerationRequest
from hat_runtime.device.session import CloudSession
from hat_runtime.device.steps import LAST, NONE, StepResult, Want
from hat_runtime.device.submodels import Advanced, DeviceFull, DeviceModel
from hat_runtime.errors import CloudOverloaded, CloudUnavailable

T = TypeVar("T")


class Answer:
    """What the generation loop does for one request.

    A round: `advance` turns a deep state into a token and its shallow state, `send_round` sends that up, and
    `finish_round` waits for the deep state that comes back. Positions and Steps are not tied to single tokens.
    """

    def __init__(
        self,
        request: GenerationRequest,
        model: DeviceModel,
        link: CloudLink,
        conversations: ConversationStore,
        *,
        open_session: Callable[[], CloudSession],
        chunk: int,
        max_evictions: int,
    ) -> None:
        """Prepare; `begin` gets a session.

        Args:
            request: what to answer; its stats are kept up to date.
            model: the device's submodels.
            link: the connection to the cloud.
            conversations: idle sessions, to reuse or to make room.
            open_session: opens a new session for this request.
            chunk: tokens of one Step of an upload, at least 1.
            max_evictions: uploads that the cloud may throw away before the request fails.
        """
        self.request = request
        self.conversation: Conversation | None = None
        self._model = model
        self._link = link
        self._conversations = conversations
        self._open_session = open_session
        self._chunk = chunk
        self._max_evictions = max_evictions
        self._fresh = True  # the session was opened for this request
        self._announced = False  # a Step has carried the request's id
        self._batch_tokens = 0  # of the cloud's pass that the last round was in
        self._bytes_before = (0, 0)  # what the session had sent and received for earlier requests

    @property
    def current(self) -> Conversation:
        """The conversation, after `begin`."""
        assert self.conversation is not None
        return self.conversation

    async def begin(self) -> None:
        """Take over an idle conversation that shares the prompt's beginning, or open a session."""
        reused = await self._conversations.take(self.request.prompt_ids)
        if reused is None:
            self.conversation = Conversation(self._open_session(), tokens=list(self.request.prompt_ids))
            return
        self.conversation, self.request.stats.cached_tokens = reused
        self._fresh = False
        session = self.conversation.session
        self._bytes_before = (session.uplink_bytes, session.downlink_bytes)

    async def upload(self) -> torch.Tensor:
        """Send the shallow states of all tokens that the cloud lacks; deep state [1, hidden_size] of the last.

        After an eviction the shallow states are computed again from the token ids.

        Raises:
            CloudUnavailable: the session ended, and a new one would not help.
        """
        while True:
            try:
                deep = await self._upload_once()
            except CloudUnavailable as error:
                await self._reopen(error)
                continue
            if deep is not None:
                return deep
            self._count_eviction()

    async def advance(self, deep: torch.Tensor) -> Advanced:
        """Head and sampling on the last deep state, and the new token's shallow state if the text goes on."""
        conversation, request = self.current, self.request
        position = len(conversation.tokens)
        more = request.stats.completion_tokens + 1 < request.max_new_tokens
        advanced = await self._with_room(
            lambda: self._model.advance(
                conversation.sequence,
                deep,
                request.sampling,
                position,
                request.stop_ids,
                embed_new=more,
                batch_tokens=self._batch_tokens,
            )
        )
        if advanced.hidden is not None:
            conversation.tokens.append(advanced.token_id)
            conversation.shallow = position + 1
        return advanced

    def send_round(self, hidden: torch.Tensor) -> asyncio.Future[StepResult]:
        """Send the shallow states [k, hidden_size] of the newest k tokens.

        Raises:
            CloudUnavailable: the session has ended.
        """
        return self._submit(len(self.current.tokens) - len(hidden), hidden, LAST)

    async def finish_round(self, pending: asyncio.Future[StepResult]) -> torch.Tensor:
        """The deep state [1, hidden_size] of a round under way; after an eviction that of a new upload."""
        self._batch_tokens = 0
        self._model.rounds_in_flight += 1
        try:
            result = await pending
        except CloudUnavailable as error:
            await self._reopen(error)
            return await self.upload()
        finally:
            self._model.rounds_in_flight -= 1
        deep = self._take(result)
        if deep is None:
            self._count_eviction()
            return await self.upload()
        self._batch_tokens = result.batch_tokens
        return deep

    def end(self) -> None:
        """Keep the conversation for its next turn, or end it where too much is still under way."""
        if self.conversation is None:
            return
        self._count_bytes()
        session = self.conversation.session
        if session.unanswered > 1:  # a cancelled upload: the cloud should not compute the rest of it
            self._conversations.discard(self.conversation)
            return
        if session.unanswered:
            session.discard()
        self._conversations.put(self.conversation)

    async def _upload_once(self) -> torch.Tensor | None:
        """One try; None if the session was evicted on the way."""
        conversation = self.current
        total = len(conversation.tokens)
        window = max(2, conversation.session.limits.max_inflight_steps)
        sent: deque[asyncio.Future[StepResult]] = deque()
        deep: torch.Tensor | None = None
        start = min(conversation.held, total - 1)
        for end in cut_at(chunk_ends(start, total, self._chunk), conversation.borders, start):
            hidden = await self._shallow(start, end)
            sent.append(self._submit(start, hidden, LAST if end == total else NONE))
            start = end
            # The next chunk's shallow pass runs while this one travels and is computed in the cloud.
            while sent and (sent[0].done() or len(sent) >= window or end == total):
                result = await sent.popleft()
                if result.stale:
                    return None
                deep = self._take(result)
        return deep

    async def _shallow(self, start: int, end: int) -> torch.Tensor:
        conversation = self.current
        ids = conversation.tokens[start:end]
        hidden = await self._with_room(lambda: self._model.shallow(conversation.sequence, ids, start))
        conversation.shallow = end
        return hidden

    def _submit(self, start: int, hidden: torch.Tensor, want: Want) -> asyncio.Future[StepResult]:
        request_id = "" if self._announced else self.request.request_id
        self._announced = True
        decode = self.current.decodes(start)
        return self.current.session.submit(start, hidden, want, request_id, decode=decode)

    def _take(self, result: StepResult) -> torch.Tensor | None:
        """Account for a Result; its deep states, None if it is stale or brings none."""
        stats = self.request.stats
        stats.cloud_queue_s += result.queue_s
        stats.cloud_compute_s += result.compute_s
        if result.deep is not None:
            stats.rounds += 1
            self._link.metrics.verify_rounds.inc()
        return result.deep

    def _count_eviction(self) -> None:
        stats = self.request.stats
        stats.evictions += 1
        if stats.evictions > self._max_evictions:
            raise CloudOverloaded(
                f"the cloud at {self._link.address} gave this request's KV cache away {stats.evictions} times: "
                "it is overloaded; try again later",
                retry_after_s=1.0,
            )

    async def _reopen(self, error: CloudUnavailable) -> None:
        """Replace a session that the cloud ended, where a new one can do better; raise the error otherwise."""
        overloaded, was_open = isinstance(error, CloudOverloaded), bool(self.current.session.session_id)
        if overloaded and was_open:  # the work was accepted once, so it is worth waiting for
            wait_s = (error.retry_after_s or 1.0) * random.uniform(0.5, 1.5)
        elif (
            overloaded and self._conversations.evict_one()
        ):  # our own idle sessions may be what fills the cloud
            wait_s = 0.05
        elif not overloaded and not self._fresh and not self.request.stats.rounds:  # ended while it was idle
            wait_s = 0.0
        else:
            raise error
        self._count_eviction()
        await asyncio.sleep(wait_s)
        self._count_bytes()
        self.current.session = self._open_session()
        self._fresh, self._bytes_before = True, (0, 0)

    def _count_bytes(self) -> None:
        session, stats = self.current.session, self.request.stats
        stats.uplink_bytes += session.uplink_bytes - self._bytes_before[0]
        stats.downlink_bytes += session.downlink_bytes - self._bytes_before[1]
        self._bytes_before = (session.uplink_bytes, session.downlink_bytes)

    async def _with_room(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do work that needs device KV pages; idle conversations give theirs up for it."""
        while True:
            try:
                return await work()
            except DeviceFull:
                if not self._conversations.evict_one():
                    raise
