"""Token mode (PicoSpec, arXiv 2603.19133): the engine over the whole model, and the target's word on drafts.

A pass is the other mode's pass between an embedding and a head: ids -> rows -> layers -> the rows that somebody asks
about, of all sessions in one head call -> verdicts. What is known without compute is answered without: a draft whose
position the cloud has decoded already, and everything behind a refusal (the paper's interrupt).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import grpc
import torch

from hat_runtime.cloud.engine import Engine, EngineConfig
from hat_runtime.cloud.metrics import CloudMetrics
from hat_runtime.cloud.scheduler import Planned
from hat_runtime.cloud.session import Failed, Session, StepDone, StepWork, Want
from hat_runtime.cloud.tokens import Decoded, Target, Tokens, Verdict
from hat_runtime.model.hf import DeviceEnds
from hat_runtime.model.runner import LayerRunner
from hat_runtime.model.speculation import THINNING, TOP_K, Weighted, accepts, draws, top_k


class TokenEngine(Engine):
    """Continuous batching over sessions that send token ids."""

    def __init__(
        self,
        runner: LayerRunner,
        ends: DeviceEnds,
        config: EngineConfig,
        metrics: CloudMetrics,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float] = time.monotonic,
        *,
        top_k: int = TOP_K,
    ) -> None:
        super().__init__(runner, config, metrics, loop, clock)
        self._ends = ends
        self._top_k = top_k

    # Before a pass

    def _submit(self, session: Session, work: StepWork) -> None:
        if work.epoch >= session.epoch:  # the device goes on, and its Step has what we would decode
            for own in [queued for queued in session.queue if _tokens(queued).own]:
                session.queue.remove(own)
        super()._submit(session, work)

    def _settle(self, session: Session, work: StepWork) -> bool:
        """Judge and skip what is known already; the rest of the Step is left to a pass."""
        tokens, state = _tokens(work), session.tokens
        if tokens.choosing is not None and tokens.choosing is not state.choosing:  # another request
            state.choosing = tokens.choosing
            state.forget()
        while work.left:
            position, token = work.position, tokens.ids[work.done]
            known = state.token_at(position)
            if work.done >= tokens.given:
                if not self._can_judge(session, work):
                    return False
                if not _stands(session, work, work.done):
                    self._refuse(session, work, work.done)
                    return False
            elif known != token:
                self._truncate(session, position)
                state.forget()
            if position == session.committed:
                return True
            work.done += 1
        self._finish(session, work)
        return False

    def _can_judge(self, session: Session, work: StepWork) -> bool:
        """Whether the row is there that tells about the draft at hand; else its stream has failed."""
        state, position = session.tokens, work.position
        if state.token_at(position) is not None or (state.tip is not None and state.tip.position == position):
            return True
        text = (
            f"Step.tokens.drafts={_tokens(work).drafts}: the row before the draft at {position} was not kept"
        )
        self._fail(session, Failed(grpc.StatusCode.INVALID_ARGUMENT, text))
        return False

    def _rows(self, planned: Planned) -> torch.Tensor:
        ids = [
            token for piece in planned.pieces for token in _tokens(piece.work).ids[piece.first : piece.last]
        ]
        return self._ends.embed(torch.tensor(ids))

    # After a pass

    def _outputs(self, passes: list[Planned], deep: list[torch.Tensor]) -> list[torch.Tensor]:
        """Logits of the rows that are asked about, float32 [rows, vocabulary] for each session."""
        asked = [_asked_rows(planned) for planned in passes]
        if not any(asked):
            return [torch.empty(0, self._ends.vocab_size) for _ in passes]
        states = torch.cat([rows[index] for rows, index in zip(deep, asked, strict=True) if index])
        logits = self._ends.head(states).to("cpu")
        parts: tuple[torch.Tensor, ...] = logits.split([len(index) for index in asked])  # type: ignore[no-untyped-call]
        return list(parts)

    def _complete(self, planned: Planned, deep: torch.Tensor, forward_s: float, tokens: int) -> None:
        session, logits = planned.session, iter(deep)
        if not torch.isfinite(deep).all():
            self._fail(session, Failed(grpc.StatusCode.INTERNAL, "the model's logits are not finite"))
            return
        for piece in planned.pieces:
            work = piece.work
            work.compute_s += forward_s
            work.batch_tokens = tokens
            # A Step that shares a pass with the one before it was not settled.
            if not (work.done or _tokens(work).given or self._can_judge(session, work)):
                return
            refused = self._judge(session, work, piece.last, logits)
            if refused is not None:
                self._refuse(session, work, refused)
                return
            if work.left:
                return
            self._finish(session, work)

    def _judge(
        self, session: Session, work: StepWork, last: int, logits: Iterator[torch.Tensor]
    ) -> int | None:
        """Take over the rows up to `last` of a Step; the index of the first id that is refused, if one is."""
        state, tokens = session.tokens, _tokens(work)
        first, work.done = work.done, last
        # A Step that shares a pass with the one before it: what its first draft must be, is known only now.
        if first == 0 and not tokens.given and not _stands(session, work, 0):
            return 0
        for index in range(first, last):
            if not _asked(work, index):
                continue
            assert state.choosing is not None
            target = Target(next(logits), state.choosing, work.start_pos + index + 1)
            if tokens.own:
                state.extend(target)
            else:
                state.set_tip(target)
            if index + 1 < work.n and not _stands(session, work, index + 1):
                return index + 1
        if work.want is Want.NONE:
            state.forget()
        return None

    def _refuse(self, session: Session, work: StepWork, index: int) -> None:
        """The target has another token in place of the id at `index`: what was built on it ends here and now."""
        state, position = session.tokens, work.start_pos + index
        self._truncate(session, state.end)
        session.epoch = max(session.epoch, work.epoch + 1)
        verdict = Verdict(
            accepted=index - _tokens(work).given,
            refused=True,
            next=state.token_at(position),
            offered=self._offer(session, position),
        )
        self._leave(session, work, verdict)
        self._go_ahead(session, afresh=True)

    def _finish(self, session: Session, work: StepWork) -> None:
        """A Step without a refusal is done."""
        tokens, state, end = _tokens(work), session.tokens, work.start_pos + work.n
        if tokens.own:
            session.queue.popleft()
            self._tell(session, Decoded(work.epoch, end, [state.known[-1]]))
            self._go_ahead(session)
            return
        if work.want is Want.NONE:
            self._leave(session, work, None)
            return
        following, offered = state.token_at(end), None
        if tokens.redraw:
            offered = self._offer(session, end, tokens.redraw)
        elif state.tip is not None and not tokens.drafts:
            following = state.tip.choice
        self._leave(session, work, Verdict(tokens.drafts, next=following, offered=offered))
        self._go_ahead(session, afresh=True)

    def _offer(self, session: Session, position: int, attempt: int = 0) -> Weighted | None:
        """What the device draws a correction from, where the cloud does not choose it."""
        tip, choosing = session.tokens.tip, session.tokens.choosing
        if tip is None or choosing is None:
            return None
        if choosing.sampler == THINNING:
            return draws(tip.p, choosing.params.seed, position, attempt)
        return top_k(tip.p, self._top_k)

    def _leave(self, session: Session, work: StepWork, verdict: Verdict | None) -> None:
        session.queue.popleft()
        if verdict is not None:
            session.answered = self._clock()
            self._metrics.verify_passes.inc()
        self._answer(session, StepDone(work, verdict=verdict))

    def _go_ahead(self, session: Session, *, afresh: bool = False) -> None:
        """Decode on by ourselves until the device sends more, so that drafting is never slower than not drafting."""
        state = session.tokens
        choosing = state.choosing
        assert choosing is not None
        if afresh:
            state.ahead_left = choosing.ahead
        if (
            state.ahead_left < 1
            or not state.known
            or state.known[-1] in choosing.stop_ids
            or session.committed >= session.max_tokens
            or (choosing.end and session.committed + 1 >= choosing.end)  # `known` ends with the last token
            or any(work.epoch >= session.epoch for work in session.queue)
        ):
            state.ahead_left = 0
            return
        state.ahead_left -= 1
        own = Tokens([state.known[-1]], own=True)
        session.queue.append(
            StepWork(session.epoch, session.committed, Want.LAST, None, self._clock(), tokens=own)
        )

    def _answer(self, session: Session, done: StepDone) -> None:
        if done.stale and _tokens(done.work).own:
            return
        super()._answer(session, done)

    def _forget(self, session: Session) -> None:
        session.tokens.forget()


def _tokens(work: StepWork) -> Tokens:
    assert work.tokens is not None
    return work.tokens


def _asked(work: StepWork, index: int) -> bool:
    """Whether the row's distribution is needed: a draft follows, or the device wants the token after the Step."""
    if index + 1 == work.n:
        return work.want is Want.LAST
    return index + 1 >= _tokens(work).given


def _asked_rows(planned: Planned) -> list[int]:
    """Rows of the session's segment whose distributions are needed."""
    rows, row = [], 0
    for piece in planned.pieces:
        for index in range(piece.first, piece.last):
            if _asked(piece.work, index):
                rows.append(row)
            row += 1
    return rows


def _stands(session: Session, work: StepWork, index: int) -> bool:
    """Whether the draft at `index` is accepted, given the accepted ones before it."""
    tokens, state, position = _tokens(work), session.tokens, work.start_pos + index
    token = tokens.ids[index]
    if state.tip is None:
        return state.token_at(position) == token
    assert state.choosing is not None
    q = tokens.q[index - tokens.given]
    return accepts(float(state.tip.p[token]), q, state.choosing.params.seed, position)
