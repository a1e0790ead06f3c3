"""The generation loop: prompt up in chunks, then rounds.

A round sends the shallow states of the newest token and of the drafts behind it, gets deep states back, and accepts the
drafts that the head agrees with, and the token that it puts behind them (HAT, arXiv 2503.18989, section III).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from hat_runtime.device.answer import Answer
from hat_runtime.device.chain import Checked
from hat_runtime.device.chunking import ChunkConfig, Chunker
from hat_runtime.device.conversations import ConversationStore
from hat_runtime.device.jobs import Turn
from hat_runtime.device.kinds import kinds_of
from hat_runtime.device.link import CloudLink
from hat_runtime.device.policy import DraftConfig, DraftPolicy
from hat_runtime.device.recent import RecentAnswers
from hat_runtime.device.recovery import Recovery, RecoveryConfig
from hat_runtime.device.request import (
    CANCELLED,
    ERROR,
    LENGTH,
    STOP,
    GenerationRequest,
    GenerationStats,
    TokenEvent,
)
from hat_runtime.device.session import CloudSession
from hat_runtime.device.steps import Binding
from hat_runtime.device.submodels import DeviceModel
from hat_runtime.errors import UsageError
from hat_runtime.wire.frames import MAX_STEP_TOKENS

__all__ = ["GenerationRequest", "GenerationStats", "Generator", "GeneratorConfig", "TokenEvent"]


@dataclass(frozen=True)
class GeneratorConfig:
    """Policies of a device."""

    chunking: ChunkConfig = field(default_factory=ChunkConfig)
    """How prompts are cut."""
    max_idle_conversations: int = 4
    """Answers whose sessions stay open for the next turn."""
    min_reuse_tokens: int = 16
    """Common tokens from which on an open session is reused."""
    max_evictions: int = 8
    """Uploads of one request that the cloud may throw away before the request fails."""
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    """What to do when the cloud is lost."""
    tenant: str = ""
    drafting: DraftConfig = field(default_factory=DraftConfig)
    """How tokens are drafted, where the model has a drafter."""
    pad_frames: bool = False
    """Frames of fixed sizes, against who looks at their sizes."""
    device_name: str = ""
    """By which the cloud lists this device; "": it does not."""


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
        self.recent = RecentAnswers()
        self.chunker = Chunker(self.config.chunking, link, binding)
        self.policy = DraftPolicy(self.config.drafting, model.drafter is not None)
        if model.drafter is not None:
            self.policy.calibration = model.drafter.calibration
        self.metrics.show_device(
            contact_age_s=lambda: link.contact_age_s,
            acceptance=lambda: link.acceptance.rate,
            shallow_s_per_token=lambda: model.shallow_s_per_token,
            row_bytes=binding.prompt_row_bytes,
        )
        self.conversations = ConversationStore(
            model,
            self.metrics,
            max_idle=self.config.max_idle_conversations,
            min_reuse=self.config.min_reuse_tokens,
            recovery=Recovery(self._open_session, self.metrics),
            patience_s=self.config.recovery.reconnect_for_s,
        )

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer together."""
        limit = self.link.limits.max_tokens
        return min(self.model.context_length, limit) if limit else self.model.context_length

    @property
    def drafting(self) -> bool:
        """Whether the next round would have drafts."""
        return self.policy.drafting

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
        began = last_s = told_s = time.monotonic()
        stats = request.stats = GenerationStats(prompt_tokens=len(request.prompt_ids), finish_reason=ERROR)
        self._begin(stats)
        answer = self._make_answer(request)
        try:
            await answer.begin()
            self.metrics.cached_prompt_tokens.inc(stats.cached_tokens)
            checked = await answer.upload()
            while True:
                early = 0
                if stats.completion_tokens:
                    turn = await self._turn(answer, checked)
                else:
                    # The first token does not wait for the drafts behind it.
                    told = asyncio.get_running_loop().create_future()
                    turning = asyncio.ensure_future(self._turn(answer, checked, told))
                    try:
                        await asyncio.wait((told, turning), return_when=asyncio.FIRST_COMPLETED)
                        if told.done():
                            early, told_s = 1, time.monotonic()
                            self._count_token(answer, told_s - began, 0.0)
                            yield TokenEvent(told.result()[0], 0, told_s)
                        turn = await turning
                    finally:
                        turning.cancel()
                        await asyncio.gather(turning, return_exceptions=True)
                now = time.monotonic()
                new = turn.tokens[early:]
                for _ in new:
                    self._count_token(answer, now - began, (now - told_s) / len(new))
                self._learn_round(answer, turn, now - last_s)
                last_s = now
                told_s = now if new else told_s
                first = stats.completion_tokens - len(new)
                for index, (token_id, kind) in enumerate(zip(new, kinds_of(turn)[early:], strict=True)):
                    yield TokenEvent(token_id, first + index, now, kind, more=index < len(new) - 1)
                if stats.finish_reason != ERROR:
                    return
                checked = await answer.next_checked()
        except (asyncio.CancelledError, GeneratorExit):
            if stats.finish_reason == ERROR:
                stats.finish_reason = CANCELLED
            raise
        finally:
            self._end(answer)

    async def _turn(
        self, answer: Answer, checked: Checked, told: asyncio.Future[list[int]] | None = None
    ) -> Turn:
        """Judge what came, draft behind it, and send that.

        The next Step leaves before the caller sees the tokens: a slow reader costs no round trip.
        """
        request, stats = answer.request, answer.request.stats
        before = stats.completion_tokens
        turn = await answer.turn(checked, told)
        if turn.tokens[-1] in request.stop_ids:
            stats.finish_reason = STOP
        elif before + len(turn.tokens) == request.max_new_tokens:
            stats.finish_reason = LENGTH
        elif not answer.in_flight:
            answer.send()
        return turn

    async def close(self) -> None:
        """End all sessions, the connection and the worker thread."""
        self.conversations.clear()
        await self.link.close()
        await self.model.close()

    def _make_answer(self, request: GenerationRequest) -> Answer:
        self.metrics.prompt_tokens.inc(len(request.prompt_ids))
        longest = self.link.limits.max_step_tokens or MAX_STEP_TOKENS

        chunks = 0

        def chunk_at(start: int, total: int) -> int:
            nonlocal chunks
            chunks += 1
            chunk = self._chunk_tokens(request, start, total, first=chunks == 1)
            return min(chunk or longest, longest)

        return Answer(
            request,
            self.model,
            self.link,
            self.conversations,
            open_session=lambda resume: self._open_session(resume, request.request_id),
            policy=self.policy,
            chunk_at=chunk_at,
            max_evictions=self.config.max_evictions,
            recovery=self.config.recovery,
        )

    def _chunk_tokens(self, request: GenerationRequest, start: int, total: int, *, first: bool) -> int:
        """Tokens of the next chunk of an upload, 0: all that is left."""
        shallow, stats = self.model.shallow_cost, request.stats
        chunk = request.chunk_tokens
        if chunk is None:
            chunk = self.chunker.size(start, total, shallow, first=first)
        if first:
            stats.predicted_ttft_s = self.chunker.predicted_s(start, total, chunk, shallow)
        stats.chunk_tokens = chunk
        self.metrics.chunk_size.set(chunk)
        return chunk

    def _open_session(self, resume: CloudSession | None, request_id: str = "") -> CloudSession:
        return self.link.open_session(
            self.binding,
            request_id=request_id,
            tenant=self.config.tenant,
            device_name=self.config.device_name,
            resume=resume,
        )

    def _begin(self, stats: GenerationStats) -> None:
        self.metrics.sessions_running.inc()
        self.recent.began(stats)

    def _end(self, answer: Answer) -> None:
        """The answer is over, however."""
        answer.end()
        stats = answer.request.stats
        self.recent.ended(stats)
        self.metrics.sessions_running.dec()
        self.metrics.requests.labels(stats.finish_reason).inc()
        self.metrics.kv_usage.set(1 - self.model.cache.free_pages / self.model.cache.num_pages)

    def _learn_round(self, answer: Answer, turn: Turn, took_s: float) -> None:
        """What a round took, for the decision whether to draft."""
        if answer.request.stats.completion_tokens > len(turn.tokens):  # not the prompt
            self.policy.after_round(took_s, turn)
        self.metrics.drafting.set(self.policy.drafting)

    def _count_token(self, answer: Answer, since_began_s: float, since_last_s: float) -> None:
        stats = answer.request.stats
        stats.completion_tokens += 1
        self.metrics.generation_tokens.inc()
        if stats.completion_tokens == 1:
            stats.ttft_s = since_began_s
            self.metrics.time_to_first_token.observe(since_began_s)
            self.metrics.predicted_ttft.set(stats.predicted_ttft_s or math.nan)
            self.chunker.saw_ttft(stats.predicted_ttft_s, since_began_s)
        else:
            stats.tbt_s = (since_began_s - stats.ttft_s) / (stats.completion_tokens - 1)
            self.metrics.inter_token_latency.observe(since_last_s)
        self.link.send_telemetry(
            answer.current.session,
            shallow_s_per_token=self.model.shallow_s_per_token,
            chunk=stats.chunk_tokens,
            ttft_s=stats.ttft_s,
        )
