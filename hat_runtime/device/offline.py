"""Answers without the cloud: the device's small model alone, where its owner wants that (--offline draft-only).

Its text is the small model's own and not the model's, so every such answer is marked, wherever it is shown.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from hat_runtime.device.generator import Generator
from hat_runtime.device.kinds import UNCHECKED
from hat_runtime.device.request import (
    CANCELLED,
    ERROR,
    LENGTH,
    STOP,
    GenerationRequest,
    GenerationStats,
    TokenEvent,
)
from hat_runtime.device.small_model import small_model_of
from hat_runtime.errors import CloudOverloaded, CloudUnavailable, HatError, UsageError

log = logging.getLogger(__name__)

REFUSE, DRAFT_ONLY = "refuse", "draft-only"
CHOICES = (REFUSE, DRAFT_ONLY)
LOOK_AGAIN_S = 2.0
"""Between two looks whether the cloud is back."""


class CloudPresence:
    """Whether the cloud is away. It is, once a look at it has failed, until another one succeeds.

    Nobody looks while it is there: what fails on its way to the cloud asks for a look. For the event loop's thread.
    """

    def __init__(self, check: Callable[[], Awaitable[Any]]) -> None:
        """`check` returns if the cloud answers, else raises a HatError that says why not."""
        self._check = check
        self._reason: str | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def away(self) -> str | None:
        """Why it is away; None: it is there, as far as anybody knows."""
        return self._reason

    async def is_away(self) -> bool:
        """Look, unless it is known to be away."""
        if self._reason is None:
            await self._look()
        return self._reason is not None

    def suspect(self) -> None:
        """Something failed on its way to the cloud: look, without anybody waiting for it."""
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Look no more."""
        if self._watching is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching

    async def _look(self) -> None:
        try:
            await self._check()
        except CloudOverloaded:
            self._is_there()
        except CloudUnavailable as error:
            if self._reason is None:
                log.warning("the cloud is away, the small model answers alone: %s", error)
            self._reason = str(error)
            self.suspect()
        except HatError:
            self._is_there()  # another cloud than this device's: that is for people to mend
        else:
            self._is_there()

    def _is_there(self) -> None:
        if self._reason is not None:
            log.info("the cloud is back")
        self._reason = None

    async def _watch(self) -> None:
        try:
            if self._reason is None:
                await self._look()
            while self._reason is not None:
                await asyncio.sleep(LOOK_AGAIN_S)
                await self._look()
        finally:
            self._watching = None


class OfflineGenerator:
    """Generates with the small model of a generator's device. For the event loop's thread."""

    def __init__(self, generator: Generator) -> None:
        """Share the generator's model, metrics and memory of answers.

        Raises:
            UsageError: this device has no whole small model.
        """
        small = small_model_of(generator.model)
        if small is None:
            raise UsageError(f"--offline {DRAFT_ONLY}: this device has no whole small model")
        self._small = small
        self._online = generator
        self._metrics = generator.metrics

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._small.context_length

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """Continue a prompt; one event per token, the stop token included.

        Closing the iterator frees everything the request held. `request.stats` is complete when the iterator has ended.

        Raises:
            UsageError: as Generator.check, or prompt and answer are longer than the small model's context.
            DeviceFull: the device's KV cache cannot hold the text.
        """
        self._check(request)
        began = told_s = time.monotonic()
        text = list(request.prompt_ids)
        stats = request.stats = GenerationStats(len(text), finish_reason=ERROR, offline=True)
        self._metrics.sessions_running.inc()
        self._metrics.offline_answers.inc()
        self._metrics.prompt_tokens.inc(len(text))
        self._online.recent.began(stats)
        small = self._small.open()
        try:
            while stats.finish_reason == ERROR:
                token = await small.next_token(text, request.sampling)
                text.append(token)
                now = time.monotonic()
                self._count(stats, now - began, now - told_s)
                told_s = now
                if token in request.stop_ids:
                    stats.finish_reason = STOP
                elif stats.completion_tokens == request.max_new_tokens:
                    stats.finish_reason = LENGTH
                yield TokenEvent(token, stats.completion_tokens - 1, now, UNCHECKED)
        except (asyncio.CancelledError, GeneratorExit):
            if stats.finish_reason == ERROR:
                stats.finish_reason = CANCELLED
            raise
        finally:
            small.close()
            self._online.recent.ended(stats)
            self._metrics.sessions_running.dec()
            self._metrics.requests.labels(stats.finish_reason).inc()

    def _check(self, request: GenerationRequest) -> None:
        self._online.check(request)
        total = len(request.prompt_ids) + request.max_new_tokens
        if total > self.context_tokens:
            raise UsageError(
                f"the prompt has {len(request.prompt_ids)} tokens and {request.max_new_tokens} new ones are asked for: "
                f"{total} together, but the context of the small model, which answers alone, is {self.context_tokens}"
            )

    def _count(self, stats: GenerationStats, since_began_s: float, since_last_s: float) -> None:
        stats.completion_tokens += 1
        self._metrics.generation_tokens.inc()
        if stats.completion_tokens == 1:
            stats.ttft_s = since_began_s
            self._metrics.time_to_first_token.observe(since_began_s)
        else:
            stats.tbt_s = (since_began_s - stats.ttft_s) / (stats.completion_tokens - 1)
            self._metrics.inter_token_latency.observe(since_last_s)
