"""The generation loop: prompt up in chunks, then one round per token.

A round sends the shallow states of the newest tokens, gets deep states back, and accepts what the head makes of them.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from hat_runtime.device.conversations import Conversation, ConversationStore
from hat_runtime.device.link import CloudLink
from hat_runtime.device.request import (
    CANCELLED,
    ERROR,
    LENGTH,
    STOP,
    GenerationRequest,
    GenerationStats,
    TokenEvent,
)
from hat_runtime.device.session import LAST, NONE, Binding, CloudSession, StepResult, Want
from hat_runtime.device.submodels import Advanced, DeviceFull, DeviceModel
from hat_runtime.errors import CloudOverloaded, CloudUnavailable, UsageError

__all__ = ["GenerationRequest", "GenerationStats", "Generator", "GeneratorConfig", "TokenEvent"]

T = TypeVar("T")


@dataclass(frozen=True)
class GeneratorConfig:
    """Policies of a device."""

    chunk_tokens: int = 128
    """Tokens of a prompt chunk; 0: the whole prompt in one Step."""
    max_idle_conversations: int = 4
    """Answers whose sessions stay open for the next turn."""
    min_reuse_tokens: int = 16
    """Common tokens from which on an open session is reused."""
    max_evictions: int = 8
    """Uploads of one request that the cloud may throw away before the request fails."""
    tenant: str = ""


@dataclass(eq=False)
class _Answer:
    """One request under way."""

    request: GenerationRequest
    conversation: Conversation
    chunk: int
    fresh: bool
    """The session was opened for this request."""
    announced: bool = False
    """A Step has carried the request's id."""
    bytes_before: tuple[int, int] = (0, 0)
    """What the session had sent and received for earlier requests."""

    @property
    def stats(self) -> GenerationStats:
        return self.request.stats

    def count_bytes(self) -> None:
        """Add to the stats what the session carried for this request; once for each session."""
        session = self.conversation.session
        self.stats.uplink_bytes += session.uplink_bytes - self.bytes_before[0]
        self.stats.downlink_bytes += session.downlink_bytes - self.bytes_before[1]
        self.bytes_before = (session.uplink_bytes, session.downlink_bytes)


class Generator:
    """Generates text with the device's submodels and one cloud. For the event loop's thread."""

    def __init__(
        self, model: DeviceModel, link: CloudLink, binding: Binding, config: GeneratorConfig | None = None
    ) -> None:
        """Use `connect` unless model and link exist already."""
        self.model = model
        self.link = link
        self.binding = binding
        self.config = config or GeneratorConfig()
        self.metrics = link.metrics
        self.conversations = ConversationStore(
            model,
            self.metrics,
            max_idle=self.config.max_idle_conversations,
            min_reuse=self.config.min_reuse_tokens,
        )

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer together."""
        limit = self.link.limits.max_tokens
        return min(self.model.context_length, limit) if limit else self.model.context_length

    def check(self, request: GenerationRequest) -> None:
        """Refuse what cannot be answered, before any work.

        Raises:
            UsageError: names the field and the numbers.
        """
        prompt, new = len(request.prompt_ids), request.max_new_tokens
        if prompt < 1:
            raise UsageError("the prompt has no token")
        if new < 1:
            raise UsageError(f"max_new_tokens is {new}, but must be at least 1")
        if request.chunk_tokens is not None and request.chunk_tokens < 0:
            raise UsageError(f"chunk_tokens is {request.chunk_tokens}, but must be 0 or more")
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.model.vocab_size:
            raise UsageError(f"the prompt has a token id outside the vocabulary of {self.model.vocab_size}")
        if prompt + new > self.context_tokens:
            raise UsageError(
                f"the prompt has {prompt} tokens and {new} new ones are asked for: {prompt + new} together, but the "
                f"context is {self.context_tokens}; shorten the prompt or ask for at most "
                f"{max(0, self.context_tokens - prompt)} new tokens"
            )

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """Continue a prompt; one event per token, the stop token included.

        Closing the iterator, or cancelling the task that reads it, frees everything the request held but a bounded
        number of idle conversations. `request.stats` is complete when the iterator has ended.

        Raises:
            UsageError: see `check`.
            CloudUnavailable: the cloud went away, is full, or evicted the session too often.
            DeviceFull: the device's KV cache cannot hold the text.
        """
        self.check(request)
        began = time.monotonic()
        stats = request.stats = GenerationStats(prompt_tokens=len(request.prompt_ids), finish_reason=ERROR)
        self.metrics.sessions_running.inc()
        answer: _Answer | None = None
        try:
            answer = await self._begin(request)
            deep = await self._upload(answer)
            last_s = began
            while True:
                advanced = await self._advance(answer, deep)
                now = time.monotonic()
                self._count_token(answer, now - began, now - last_s)
                last_s = now
                # The next Step leaves before the caller sees the token: a slow reader costs no round trip.
                pending = self._send_round(answer, advanced) if advanced.hidden is not None else None
                if pending is None:
                    stats.finish_reason = STOP if advanced.token_id in request.stop_ids else LENGTH
                yield TokenEvent(advanced.token_id, stats.completion_tokens - 1, now)
                if pending is None:
                    return
                deep = await self._finish_round(answer, pending)
        except (asyncio.CancelledError, GeneratorExit):
            if stats.finish_reason == ERROR:
                stats.finish_reason = CANCELLED
            raise
        finally:
            if answer is not None:
                self._finish(answer)
            if stats.completion_tokens > 1:
                stats.tbt_s = (last_s - began - stats.ttft_s) / (stats.completion_tokens - 1)
            self.metrics.sessions_running.dec()
            self.metrics.requests.labels(stats.finish_reason).inc()

    async def close(self) -> None:
        """End all sessions, the connection and the worker thread."""
        self.conversations.clear()
        await self.link.close()
        await self.model.close()

    # One request

    async def _begin(self, request: GenerationRequest) -> _Answer:
        chunk = self.config.chunk_tokens if request.chunk_tokens is None else request.chunk_tokens
        request.stats.chunk_tokens = chunk
        self.metrics.chunk_size.set(chunk)
        self.metrics.prompt_tokens.inc(len(request.prompt_ids))
        longest = self.link.limits.max_step_tokens or len(request.prompt_ids)
        size = min(chunk or longest, longest)
        reused = await self.conversations.take(request.prompt_ids)
        if reused is not None:
            conversation, request.stats.cached_tokens = reused
            self.metrics.cached_prompt_tokens.inc(request.stats.cached_tokens)
            session = conversation.session
            before = (session.uplink_bytes, session.downlink_bytes)
            return _Answer(request, conversation, size, fresh=False, bytes_before=before)
        conversation = Conversation(self._open(request), tokens=list(request.prompt_ids))
        return _Answer(request, conversation, size, fresh=True)

    def _open(self, request: GenerationRequest) -> CloudSession:
        return self.link.open_session(self.binding, request_id=request.request_id, tenant=self.config.tenant)

    async def _upload(self, answer: _Answer) -> torch.Tensor:
        """Send the shallow states of all tokens that the cloud lacks; deep state [1, hidden_size] of the last.

        After an eviction the shallow states are computed again from the token ids.
        """
        while True:
            try:
                deep = await self._upload_once(answer)
            except CloudUnavailable as error:
                await self._reopen(answer, error)
                continue
            if deep is not None:
                return deep
            self._count_eviction(answer)

    def _count_eviction(self, answer: _Answer) -> None:
        answer.stats.evictions += 1
        if answer.stats.evictions > self.config.max_evictions:
            raise CloudOverloaded(
                f"the cloud at {self.link.address} gave this request's KV cache away "
                f"{answer.stats.evictions} times: it is overloaded; try again later",
                retry_after_s=1.0,
            )

    async def _reopen(self, answer: _Answer, error: CloudUnavailable) -> None:
        """Replace a session that the cloud ended, where a new one can do better; raise the error otherwise."""
        session = answer.conversation.session
        overloaded, was_open = isinstance(error, CloudOverloaded), bool(session.session_id)
        if overloaded and was_open:  # the work was accepted once, so it is worth waiting for
            wait_s = (error.retry_after_s or 1.0) * random.uniform(0.5, 1.5)
        elif (
            overloaded and self.conversations.evict_one()
        ):  # our own idle sessions may be what fills the cloud
            wait_s = 0.05
        elif not overloaded and not answer.fresh and not answer.stats.rounds:  # ended while it was idle
            wait_s = 0.0
        else:
            raise error
        self._count_eviction(answer)
        await asyncio.sleep(wait_s)
        answer.count_bytes()
        answer.conversation.session = self._open(answer.request)
        answer.fresh, answer.bytes_before = True, (0, 0)

    async def _upload_once(self, answer: _Answer) -> torch.Tensor | None:
        """One try; None if the session was evicted on the way."""
        conversation, session = answer.conversation, answer.conversation.session
        total = len(conversation.tokens)
        window = max(2, session.limits.max_inflight_steps)
        sent: deque[asyncio.Future[StepResult]] = deque()
        taken: torch.Tensor | None = None
        for start in range(min(conversation.held, total - 1), total, answer.chunk):
            end = min(start + answer.chunk, total)
            hidden = await self._shallow(conversation, start, end)
            sent.append(self._submit(answer, start, hidden, LAST if end == total else NONE))
            # The next chunk's shallow pass runs while this one travels and is computed in the cloud.
            while sent and (sent[0].done() or len(sent) >= window or end == total):
                result = await sent.popleft()
                if result.stale:
                    return None
                taken = self._take(answer, result)
        return taken

    async def _shallow(self, conversation: Conversation, start: int, end: int) -> torch.Tensor:
        ids = conversation.tokens[start:end]
        hidden = await self._with_room(lambda: self.model.shallow(conversation.sequence, ids, start))
        conversation.shallow = end
        return hidden

    async def _advance(self, answer: _Answer, deep: torch.Tensor) -> Advanced:
        """Head and sampling on the last deep state, and the new token's shallow state if the text goes on."""
        conversation, request = answer.conversation, answer.request
        position = len(conversation.tokens)
        more = answer.stats.completion_tokens + 1 < request.max_new_tokens
        advanced = await self._with_room(
            lambda: self.model.advance(
                conversation.sequence, deep, request.sampling, position, request.stop_ids, embed_new=more
            )
        )
        if advanced.hidden is not None:
            conversation.tokens.append(advanced.token_id)
            conversation.shallow = position + 1
        return advanced

    def _send_round(self, answer: _Answer, advanced: Advanced) -> asyncio.Future[StepResult]:
        assert advanced.hidden is not None
        return self._submit(answer, len(answer.conversation.tokens) - 1, advanced.hidden, LAST)

    def _submit(
        self, answer: _Answer, start: int, hidden: torch.Tensor, want: Want
    ) -> asyncio.Future[StepResult]:
        request_id = "" if answer.announced else answer.request.request_id
        answer.announced = True
        return answer.conversation.session.submit(start, hidden, want, request_id)

    async def _finish_round(self, answer: _Answer, pending: asyncio.Future[StepResult]) -> torch.Tensor:
        """The deep states of a round under way; after an eviction those of a new upload."""
        try:
            deep = self._take(answer, await pending)
        except CloudUnavailable as error:
            await self._reopen(answer, error)
            return await self._upload(answer)
        if deep is None:
            self._count_eviction(answer)
            return await self._upload(answer)
        return deep

    def _take(self, answer: _Answer, result: StepResult) -> torch.Tensor | None:
        """Account for a Result; its deep states, None if it is stale or brings none."""
        answer.stats.cloud_queue_s += result.queue_s
        answer.stats.cloud_compute_s += result.compute_s
        if result.deep is not None:
            answer.stats.rounds += 1
            self.metrics.verify_rounds.inc()
        return result.deep

    async def _with_room(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do work that needs device KV pages; idle conversations give theirs up for it."""
        while True:
            try:
                return await work()
            except DeviceFull:
                if not self.conversations.evict_one():
                    raise

    def _count_token(self, answer: _Answer, since_began_s: float, since_last_s: float) -> None:
        stats = answer.stats
        stats.completion_tokens += 1
        self.metrics.generation_tokens.inc()
        if stats.completion_tokens == 1:
            stats.ttft_s = since_began_s
            self.metrics.time_to_first_token.observe(since_began_s)
        else:
            self.metrics.inter_token_latency.observe(since_last_s)
        self.link.send_telemetry(
            answer.conversation.session,
            shallow_s_per_token=self.model.shallow_s_per_token,
            chunk=stats.chunk_tokens,
            ttft_s=stats.ttft_s,
        )

    def _finish(self, answer: _Answer) -> None:
        """Keep the conversation for its next turn, or end it where too much is still under way."""
        answer.count_bytes()
        session = answer.conversation.session
        if session.unanswered > 1:  # a cancelled upload: the cloud should not compute the rest of it
            self.conversations.discard(answer.conversation)
            return
        if session.unanswered:
            session.discard()
        self.conversations.put(answer.conversation)
        self.metrics.kv_usage.set(1 - self.model.cache.free_pages / self.model.cache.num_pages)
