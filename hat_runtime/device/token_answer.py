"""Token mode (PicoSpec, arXiv 2603.19133): one request under way.

Two things change the text, and neither waits for the other: the drafter here appends, and what the cloud says
(token_uplink.py) settles tokens or cuts the text where a draft was refused.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import cast

from hat_runtime.device.drafting.ngram import lookup
from hat_runtime.device.request import LENGTH, STOP
from hat_runtime.device.token_drafting import MODEL, TRUST, Draft, DraftModel
from hat_runtime.device.token_uplink import SpeculationConfig, TokenUplink

__all__ = ["SpeculationConfig", "TokenAnswer"]

PREFILL_TOKENS = 256
"""Prompt tokens that the draft model runs at once; other sessions' drafts wait so long."""


class TokenAnswer(TokenUplink):
    """What the token mode does for one request: `begin`, then `tokens` to its end, then `end`."""

    async def tokens(self) -> AsyncIterator[tuple[int, str]]:
        """The answer's tokens, the stop token included, each with its kind (kinds.py).

        Raises:
            CloudUnavailable: as Answer.upload.
            DeviceFull: the draft model's KV cache cannot hold the text.
        """
        self._attach(reused=not self._fresh)
        drafter = asyncio.create_task(self._draft_on())
        told = len(self.request.prompt_ids)
        try:
            while True:
                while told < self.settled:
                    told += 1
                    if told == self.settled and self._finished:
                        stopped = self.text[told - 1] in self.request.stop_ids
                        self.request.stats.finish_reason = STOP if stopped else LENGTH
                    yield self.text[told - 1], self.kinds[told - 1 - len(self.request.prompt_ids)]
                if self._finished:
                    return
                if self._broken is not None:
                    raise self._broken
                if self._lost is not None:
                    await self._replace_session(self._lost)
                    continue
                await self._wake.wait()
                self._wake.clear()
        finally:
            drafter.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await drafter

    def end(self) -> None:
        """Keep the conversation with what is settled of it, or end it where the cloud may be busy for nothing."""
        if self.conversation is None:
            return
        conversation, session = self.conversation, self.conversation.session
        session.on_decoded = session.on_end = session.on_evicted = None
        conversation.tokens = self.text[: self.settled]
        plain = self._config.max_draft == 0  # nothing runs here, so nothing is lacking
        conversation.shallow = self.settled if plain else min(self._drafted, self.settled)
        ended = self.request.stats.finish_reason in (STOP, LENGTH)
        if not ended and (self._ahead > 1 or self.settled == len(self.request.prompt_ids)):
            self._count_bytes()
            self._conversations.discard(conversation)
            return
        if session.unanswered:
            session.discard()
        self._count_bytes()
        self._conversations.put(conversation)

    # The drafter's side

    def _may_draft(self) -> bool:
        config, open_drafts = self._config, len(self.text) - self.settled
        if len(self.text) >= self._total or self._redraw or self._finished:
            return False
        if config.window == 1 and self._sent > self.settled:
            return False
        if config.adaptive and self._cloud_goes_on and not self._pace.drafting:
            return False
        if not self._in_cloud and self.settled == len(self.request.prompt_ids):
            return False  # the first token is drawn in the cloud, whatever was drafted
        if any(token in self.request.stop_ids for token in self.text[self.settled :]):
            return False
        return open_drafts < config.window * config.max_draft

    async def _draft_on(self) -> None:
        """Draft for as long as the request lives."""
        try:
            if self._config.max_draft == 0:
                return
            while True:
                if len(self.text) - self._drafted > PREFILL_TOKENS:
                    await self._draft_once(proposes=False)
                elif self._may_draft():
                    if (copied := self._copied()) is not None:
                        self._append(copied)
                    else:
                        await self._draft_once(proposes=True)
                    self._flush(force=not self._may_draft())
                else:
                    self._may_draft_again.clear()
                    await self._may_draft_again.wait()
        except Exception as error:
            self._broken = error
            self._wake.set()

    def _copied(self) -> Draft | None:
        """What followed the last tokens before, where that is right more often than the draft model."""
        if not self._in_cloud:
            return None  # other samplers need a distribution
        found = lookup(self.text, with_proposal=False)
        if found is None:
            return None
        rate = self._calibration.rate
        if rate(found.source, found.confidence) <= rate(MODEL, TRUST):
            return None
        return Draft(found.token, source=found.source, confidence=found.confidence)

    def _append(self, draft: Draft) -> None:
        self._drafts[len(self.text)] = draft
        self.text.append(draft.token)
        self.request.stats.draft_tokens += 1
        self._link.metrics.draft_tokens.inc()

    async def _draft_once(self, *, proposes: bool) -> None:
        start, branch = self._drafted, self._branch
        ids = self.text[start:] if proposes else self.text[start : start + PREFILL_TOKENS]
        position, separate = start + len(ids), not self._in_cloud
        sequence, params = self.current.sequence, self.request.sampling
        self._drafted = position
        try:
            draft = await self._with_room(
                lambda: cast(DraftModel, self._model).draft(
                    sequence, ids, start, params, proposes=proposes, separate=separate
                )
            )
        except BaseException:
            self._drafted = min(self._drafted, start)
            raise
        if draft is None:
            return
        if branch != self._branch or position != len(self.text) or not self._may_draft():
            self._drafted = min(self._drafted, len(self.text) - 1)
            return
        self._append(draft)
