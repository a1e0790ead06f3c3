"""Token mode: the generation loop's outside, as Generator has it for hidden states."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from hat_runtime.control.drafting import Calibration, Pace
from hat_runtime.device.generator import Generator, GeneratorConfig
from hat_runtime.device.kinds import ACCEPTED, CORRECTED
from hat_runtime.device.link import CloudLink
from hat_runtime.device.request import (
    CANCELLED,
    ERROR,
    GenerationRequest,
    GenerationStats,
    TokenEvent,
)
from hat_runtime.device.steps import Binding
from hat_runtime.device.token_answer import SpeculationConfig, TokenAnswer
from hat_runtime.device.token_drafting import DraftModel


class TokenGenerator(Generator):
    """Generates text with a small model on the device and the whole large one in the cloud."""

    def __init__(
        self,
        model: DraftModel,
        link: CloudLink,
        binding: Binding,
        config: GeneratorConfig | None = None,
        speculation: SpeculationConfig | None = None,
    ) -> None:
        """Use `connect_tokens` unless model and link exist already."""
        super().__init__(model, link, binding, config)
        self.speculation = speculation or SpeculationConfig()
        self.pace = Pace()
        self.calibration = Calibration()

    @property
    def drafting(self) -> bool:
        """See Generator."""
        speculation = self.speculation
        return speculation.max_draft > 0 and (self.pace.drafting or not speculation.adaptive)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """See Generator.generate."""
        self.check(request)
        began = last_s = time.monotonic()
        stats = request.stats = GenerationStats(prompt_tokens=len(request.prompt_ids), finish_reason=ERROR)
        self._begin(stats)
        answer = self._make_token_answer(request)
        try:
            await answer.begin()
            self.metrics.cached_prompt_tokens.inc(stats.cached_tokens)
            tokens = answer.tokens()
            try:
                async for token, kind in tokens:
                    now = time.monotonic()
                    self._count_token(answer, now - began, now - last_s)
                    # Here and not where it was settled: an answer that is cut has no more than it was told.
                    stats.accepted_tokens += kind == ACCEPTED
                    stats.refusals += kind == CORRECTED
                    last_s = now
                    yield TokenEvent(token, stats.completion_tokens - 1, now, kind)
            finally:
                await tokens.aclose()  # type: ignore[attr-defined]
        except (asyncio.CancelledError, GeneratorExit):
            if stats.finish_reason == ERROR:
                stats.finish_reason = CANCELLED
            raise
        finally:
            self._end(answer)

    def _make_token_answer(self, request: GenerationRequest) -> TokenAnswer:
        self.metrics.prompt_tokens.inc(len(request.prompt_ids))
        return TokenAnswer(
            request,
            self.model,
            self.link,
            self.conversations,
            open_session=lambda resume: self._open_session(resume, request.request_id),
            policy=self.policy,
            chunk_at=lambda start, total: 1,  # ids are not cut into chunks: the cloud's passes are
            max_evictions=self.config.max_evictions,
            recovery=self.config.recovery,
            speculation=self.speculation,
            pace=self.pace,
            calibration=self.calibration,
        )
