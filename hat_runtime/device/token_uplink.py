"""Token mode (PicoSpec, arXiv 2603.19133): one request's text, and what passes between it and the cloud.

The text is the prompt, the tokens that are settled, and behind them the drafts. With a sampler that chooses in the
cloud, every word of the cloud is about the one text that target and seed define, so a late or repeated one does no
harm.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from hat_runtime.control.drafting import Calibration, Pace
from hat_runtime.device.answer import Answer
from hat_runtime.device.kinds import ACCEPTED, CORRECTED, PLAIN
from hat_runtime.device.steps import LAST, NONE, StepResult
from hat_runtime.device.token_drafting import Draft
from hat_runtime.errors import CloudUnavailable, HatError
from hat_runtime.model.speculation import (
    COUPLED,
    TOPK,
    Weighted,
    residual_of_top_k,
    thin,
    top_k_bound,
)
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.wire.frames import MAX_STEP_TOKENS


@dataclass(frozen=True)
class SpeculationConfig:
    """How a device speculates."""

    max_draft: int = 4
    """gamma: drafts of a round. 0: none, the cloud decodes by itself."""
    window: int = 2
    """Rounds that may be drafted and not judged; 1: synchronous, no drafting while a round is judged."""
    sampler: str = COUPLED
    """"coupled", "thinning" (both exact) or "topk" (the paper's; lossy above temperature 0)."""
    step_drafts: int | None = None
    """Drafts that are sent together; None: a whole round."""
    ahead: int | None = None
    """Tokens that the cloud runs by itself while it has no drafts to judge; 1 is the paper's pre-verify of a
    correction. None: as many as are wanted, but none where it must wait for a device that waits for it (window 1)."""
    adaptive: bool = True
    """Stop drafting where the cloud is faster alone."""


@dataclass(frozen=True)
class _Sent:
    """A Step under way."""

    start: int
    ids: list[int]
    drafts: int
    era: int


class TokenUplink(Answer):
    """Sends the text, and settles or cuts it by what the cloud says."""

    def __init__(
        self, *args: Any, speculation: SpeculationConfig, pace: Pace, calibration: Calibration, **fields: Any
    ) -> None:
        super().__init__(*args, **fields)
        self._config = speculation
        self._pace = pace
        self._calibration = calibration
        self._settled_s = 0.0  # time.monotonic() of the newest settled token; 0: none yet
        params, new = self.request.sampling, self.request.max_new_tokens
        plain = speculation.max_draft == 0
        self._sampler = COUPLED if plain else speculation.sampler
        self._in_cloud = self._sampler == COUPLED or params.temperature == 0.0
        self._ahead = new - 1 if self._cloud_goes_on else speculation.ahead or 0
        self._step_drafts = speculation.step_drafts or max(1, speculation.max_draft)
        if (
            speculation.window == 1
        ):  # what is in flight forbids drafting, so a round must not be sent in parts
            self._step_drafts = max(1, speculation.max_draft)
        self.text: list[int] = list(self.request.prompt_ids)
        self.settled = len(self.text)
        self.kinds: list[str] = []  # of the settled tokens, without the prompt's
        self._total = self.settled + new
        self._drafts: dict[int, Draft] = {}
        self._drafted = 0  # tokens of the text in the draft model's KV cache
        self._sent = 0  # tokens of the text that were sent
        self._era = 0  # of what was sent: Steps of an earlier one are of no interest
        self._branch = 0  # of the text: a draft made for an earlier one is thrown away
        self._redraw = 0  # > 0: all of the cloud's draws failed, and more were asked for
        self._announce = True  # the next Step says how tokens are chosen
        self._first_epoch = 0
        self._lost: HatError | None = None
        self._broken: BaseException | None = None
        self._wake, self._may_draft_again = asyncio.Event(), asyncio.Event()

    @property
    def _cloud_goes_on(self) -> bool:
        """The cloud decodes by itself whenever there is nothing to judge: the text comes without drafts as well."""
        config = self._config
        return config.max_draft == 0 or (config.ahead is None and config.window > 1 and self._in_cloud)

    @property
    def _finished(self) -> bool:
        prompt = len(self.request.prompt_ids)
        if self.settled == prompt:
            return False
        return self.settled == self._total or self.text[self.settled - 1] in self.request.stop_ids

    def _attach(self, *, reused: bool) -> None:
        """Begin on the conversation's session: send all that it lacks."""
        conversation, session = self.current, self.current.session
        if reused:
            session.discard()  # what the cloud still decodes by itself belongs to the last request
        self._first_epoch = session.epoch
        session.on_decoded = self._decoded_in_turn
        session.on_end, session.on_evicted = self._ended, self._evicted
        self._drafted = min(conversation.shallow, self.settled - 1) if self._era == 0 else self._drafted
        self._restart(min(conversation.held, self.settled - 1) if reused else session.committed)

    def _restart(self, start: int) -> None:
        """Send the text again from a settled position on."""
        self._era += 1
        self._sent, self._announce = min(start, self.settled - 1), True
        self._flush(force=True)

    def _flush(self, *, force: bool = False) -> None:
        """Send what was not sent, as soon as it is worth a Step."""
        if self._lost is not None:
            return
        longest = self.current.session.limits.max_step_tokens or MAX_STEP_TOKENS
        while self._sent < len(self.text):
            drafts = len(self.text) - max(self.settled, self._sent)
            if not force and drafts < self._step_drafts:
                return
            end = min(len(self.text), self._sent + longest)
            if end == self.settled < len(self.text) and end - self._sent > 1:
                end -= 1  # the last settled token goes along with the first draft
            self._send(end)

    def _send(self, end: int) -> None:
        start, ids = self._sent, self.text[self._sent : end]
        drafts = max(0, end - max(self.settled, start))
        step = pb.TokenStep(ids=ids, drafts=drafts)
        if drafts and not self._in_cloud:
            step.q.extend(self._drafts[position].q for position in range(end - drafts, end))
        if self._announce:
            step.sampling.CopyFrom(self._sampling())
            self._announce = False
        last = end >= self.settled
        if last:
            step.redraw = self._redraw
        request_id = "" if self._announced else self.request.request_id
        self._announced = True
        self._sent = end
        sent = _Sent(start, ids, drafts, self._era)
        try:
            result = self.current.session.submit_tokens(start, step, LAST if last else NONE, request_id)
        except HatError as error:
            self._ended(error)
            return
        result.add_done_callback(lambda done: self._answered(sent, done))

    def _sampling(self) -> pb.Sampling:
        params = self.request.sampling
        return pb.Sampling(
            sampler=self._sampler,
            temperature=params.temperature,
            top_p=params.top_p,
            seed=params.seed % 2**64,
            ahead=self._ahead,
            stop_ids=sorted(self.request.stop_ids),
            end=self._total,
        )

    def _answered(self, sent: _Sent, done: asyncio.Future[StepResult]) -> None:
        if done.cancelled() or done.exception() is not None:  # the session's end is told by on_end
            return
        result = done.result()
        if result.stale:
            if sent.era == self._era:
                self._resend()
            return
        self._take(result)
        verdict = result.verdict
        if verdict is None:
            return
        self.request.stats.rounds += 1
        self._link.metrics.verify_rounds.inc()
        first = sent.start + len(sent.ids) - sent.drafts
        for position in range(first, first + verdict.accepted):
            self._settle(position, sent.ids[position - sent.start])
        position = first + verdict.accepted
        if verdict.HasField("next"):
            self._settle(position, verdict.next)
        elif verdict.ids and sent.era == self._era:
            self._correct(position, Weighted(list(verdict.ids), list(verdict.probabilities)))

    def _decoded_in_turn(self, decoded: pb.Decoded) -> None:
        # Results before it come by futures, which the loop calls back later.
        asyncio.get_running_loop().call_soon(self._decoded, decoded)

    def _decoded(self, decoded: pb.Decoded) -> None:
        if decoded.epoch >= self._first_epoch:
            for offset, token in enumerate(decoded.ids):
                self._settle(decoded.start_pos + offset, token)

    def _settle(self, position: int, token: int) -> None:
        """The target's token at a position is known."""
        if position != self.settled or self._finished:
            return  # told before
        draft = self._drafts.get(position)
        if draft is not None:
            self._calibration.observe(draft.source, draft.confidence, draft.token == token)
        if position < len(self.text) and self.text[position] == token:
            self._link.metrics.accepted_tokens.inc()
            self._link.acceptance.add(1, 1)
            self._drafts.pop(position, None)
            self._settled(ACCEPTED)
        else:
            self._cut(position)
            self.text.append(token)
            self._settled(PLAIN if draft is None else CORRECTED)
        self._note_pace()

    def _settled(self, kind: str) -> None:
        """The next token of the text is certain."""
        self.settled += 1
        self.kinds.append(kind)
        self._wake.set()
        self._may_draft_again.set()

    def _note_pace(self) -> None:
        now = time.monotonic()
        if self._settled_s and self._cloud_goes_on:
            self._pace.saw(now - self._settled_s)
        self._settled_s = now

    def _cut(self, position: int) -> None:
        """Drop the text from `position` on; what of it is under way is of no interest any more."""
        if position == len(self.text):
            return
        self._link.acceptance.add(0, len(self.text) - position)
        del self.text[position:]
        self._drafted = min(self._drafted, position)
        self._drafts = {at: draft for at, draft in self._drafts.items() if at < position}
        self._branch += 1
        if position < self._sent:
            session = self.current.session
            session.discard()
            self._era += 1
            self._sent = min(position, session.committed)

    def _correct(self, position: int, offered: Weighted) -> None:
        """Draw the token in place of a refused draft from what the cloud offers."""
        draft, seed = self._drafts.get(position), self.request.sampling.seed
        assert draft is not None
        assert draft.distribution is not None
        if self._sampler == TOPK:
            self._link.metrics.topk_tv_bound.observe(top_k_bound(offered.probabilities))
            token: int | None = residual_of_top_k(offered, draft.distribution, seed, position)
        else:
            token = thin(offered, draft.distribution, seed, position, self._redraw)
        if token is not None:
            self._redraw = 0
            self._cut(position)
            self._drafts.pop(position, None)
            self.text.append(token)
            self._settled(CORRECTED)
            return
        self._redraw += 1
        self._cut(position)
        self._drafts[position] = draft
        self._sent = min(self._sent, position - 1)
        self._flush(force=True)

    # When something is lost

    def _evicted(self) -> None:
        if not self.current.session.unanswered:  # else a stale Result tells
            self._resend()

    def _resend(self) -> None:
        """The cloud gave the session's KV cache to others."""
        try:
            self._count_eviction()
        except CloudUnavailable as error:
            self._broken = error
            self._wake.set()
            return
        self._restart(self.current.session.committed)

    def _ended(self, error: HatError) -> None:
        if self._lost is None:
            self._lost = error
            self._wake.set()

    async def _replace_session(self, error: HatError) -> None:
        await self._reopen(error)
        self._lost = None
        self._attach(reused=False)
