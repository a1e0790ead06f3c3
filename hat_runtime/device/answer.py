"""One request under way: uploads, rounds, and what to do when the cloud gives the KV cache or the session away."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from hat_runtime.control.chunks import cut_at, varying_ends
from hat_runtime.device.chain import NO_DRAFTS, Alternative, Checked, Speculation
from hat_runtime.device.conversations import Conversation, ConversationStore
from hat_runtime.device.drafting.base import DraftState
from hat_runtime.device.jobs import Turn
from hat_runtime.device.link import CloudLink
from hat_runtime.device.policy import DraftPolicy
from hat_runtime.device.recovery import OPENING_FOR_S, Recovery, RecoveryConfig
from hat_runtime.device.request import GenerationRequest
from hat_runtime.device.session import CloudSession
from hat_runtime.device.steps import ALL, LAST, NONE, StepResult, Want
from hat_runtime.device.submodels import DeviceFull, DeviceModel
from hat_runtime.errors import CloudOverloaded, CloudUnavailable, HatError
from hat_runtime.model.pages import PagedSequence

T = TypeVar("T")


@dataclass(frozen=True)
class _Round:
    """A Step whose deep states are to be judged."""

    future: asyncio.Future[StepResult]
    sent_s: float
    alone: bool
    """No other was under way when it was sent."""
    behind: int
    """Rows before that of the last certain token: known already."""
    alternatives: tuple[tuple[int, int], ...]
    """(position, token) of its last rows."""


class Answer:
    """What the generation loop does for one request.

    A round: `turn` makes of deep states certain tokens and new drafts, `send` sends their shallow states up, and
    `next_checked` waits for the deep states that come back, and drafts on meanwhile.
    """

    def __init__(
        self,
        request: GenerationRequest,
        model: DeviceModel,
        link: CloudLink,
        conversations: ConversationStore,
        *,
        open_session: Callable[[CloudSession | None], CloudSession],
        policy: DraftPolicy,
        chunk_at: Callable[[int, int], int],
        max_evictions: int,
        recovery: RecoveryConfig | None = None,
    ) -> None:
        """Prepare; `begin` gets a session.

        Args:
            request: what to answer; its stats are kept up to date.
            model: the device's submodels.
            link: the connection to the cloud.
            conversations: idle sessions, to reuse or to make room.
            open_session: opens a session for this request: a new one, or in place of one whose stream was lost.
            policy: how to draft.
            chunk_at: tokens of the next Step of an upload, at least 1, from (tokens that went before, all tokens).
            max_evictions: uploads that the cloud may throw away before the request fails.
            recovery: how persistent to be when the cloud is lost.
        """
        self.request = request
        self.conversation: Conversation | None = None
        self._model = model
        self._link = link
        self._conversations = conversations
        self._open_session = open_session
        self._policy = policy
        self._chunk_at = chunk_at
        self._max_evictions = max_evictions
        self._persistence = recovery or RecoveryConfig()
        self._recovery = Recovery(open_session, link.metrics)
        self._spec = Speculation(PagedSequence(), DraftState(), request.sampling)
        self._in_flight: deque[_Round] = deque()
        self._sent_end = 0  # position after the last row that was sent
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
        request = self.request
        reused = await self._conversations.take(request.prompt_ids)
        if reused is None:
            self.conversation = Conversation(
                self._open_session(None),
                tokens=list(request.prompt_ids),
                drafting=self._model.open_drafting(),
            )
        else:
            self.conversation, request.stats.cached_tokens = reused
            self._fresh = False
            session = self.conversation.session
            self._bytes_before = (session.uplink_bytes, session.downlink_bytes)
            if session.error is not None:  # lost just now
                await self._reopen(session.error)
                request.stats.cached_tokens = min(request.stats.cached_tokens, self.conversation.held)
        self._spec = Speculation(
            self.conversation.sequence,
            self.conversation.drafting,
            request.sampling,
            self._policy.config.sampler,
            request.stop_ids,
            list(request.prompt_ids),
            len(request.prompt_ids) + request.max_new_tokens,
        )

    async def upload(self) -> Checked:
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
                return Checked(deep)
            self._count_eviction()

    async def turn(self, checked: Checked, told: asyncio.Future[list[int]] | None = None) -> Turn:
        """What deep states say: tokens that are certain now, and new drafts behind them.

        `told` gets the tokens before there are drafts.
        """
        stats = self.request.stats
        turn = await self._model.turn(
            self._spec,
            checked.deep,
            self._policy.plan(alternatives=self.current.session.takes_alternatives),
            alternatives=checked.alternatives,
            go_on=not self._in_flight,
            most=self.request.max_new_tokens - stats.completion_tokens,
            batch_tokens=self._batch_tokens,
            told=told,
        )
        starved = turn.starved
        while starved:  # the token is certain, but there was no room for it
            if not self._conversations.evict_one():
                raise DeviceFull(
                    f"the device's KV cache is full: {len(self._spec.tokens)} tokens do not fit; end other sessions or "
                    "raise the device's KV tokens"
                )
            starved = (await self._model.turn(self._spec, None, NO_DRAFTS)).starved
        self._keep_accounts(turn)
        return turn

    def send(self) -> None:
        """Send the shallow states of the newest certain token, and of the drafts behind it, that were not sent.

        If the session has ended, `next_checked` deals with it.
        """
        spec = self._spec
        last = len(spec.tokens) - 1
        lacking = last + 1 - len(spec.hidden[0])  # position of the first row
        first = max(self._sent_end, lacking)
        rows = torch.cat(spec.hidden)[first - lacking :]
        sent_end = first + len(rows)
        alternatives = self._alternatives(max(first, last), sent_end)
        hidden = torch.cat([rows, *(other.hidden for _, other in alternatives)])
        try:
            future = self._submit(first, hidden, ALL, tuple(position for position, _ in alternatives))
        except HatError as error:  # not raised here: the caller has not been told of the newest tokens yet
            future = asyncio.get_running_loop().create_future()
            future.set_exception(error)
            future.exception()  # whoever waits gets it; nobody waiting is no mistake
        self._sent_end = sent_end
        if self._in_flight:
            self._link.metrics.rounds_ahead.inc()
        self._in_flight.append(
            _Round(
                future,
                time.monotonic(),
                alone=not self._in_flight,
                behind=max(0, last - first),
                alternatives=tuple((position, other.token) for position, other in alternatives),
            )
        )

    def _alternatives(self, first: int, end: int) -> list[tuple[int, Alternative]]:
        """Those to be checked in a Step with the rows of positions first <= p < end.

        Not those of the first: the round before it judges that draft.
        """
        session = self.current.session
        # Until the cloud's pass is over they take room in its cache.
        room = min(session.limits.max_tokens or end, session.limits.max_step_tokens + first) - end
        found = [
            (position, other)
            for position in range(first + 1, end)
            for other in self._spec.alternatives.get(position, ())
        ]
        return found[: max(0, room)] if session.takes_alternatives else []

    @property
    def in_flight(self) -> int:
        """Rounds that were sent and not judged."""
        return len(self._in_flight)

    async def next_checked(self) -> Checked:
        """The deep states of the oldest round; after an eviction those of a new upload.

        While it is on its way, the device drafts on.
        """
        oldest = self._in_flight[0]
        self._model.rounds_in_flight += 1
        try:
            await self._draft_ahead(oldest)
            result = await oldest.future
        except CloudUnavailable as error:
            self._forget_drafts()
            await self._reopen(error)
            return await self.upload()
        finally:
            self._model.rounds_in_flight -= 1
        self._in_flight.popleft()
        deep = self._take(result)
        if deep is None:
            self._forget_drafts()
            self._count_eviction()
            return await self.upload()
        self._batch_tokens = 0 if self._in_flight else result.batch_tokens
        self._policy.saw_pass(result.batch_tokens, len(deep), result.compute_s)
        self._policy.row_link_s = self._link.row_s(self.current.session.binding)
        if oldest.alone:
            self._policy.times.saw_wait(time.monotonic() - oldest.sent_s)
        return Checked(deep[oldest.behind :], oldest.alternatives)

    async def _draft_ahead(self, oldest: _Round) -> None:
        """Draft on, and send what is likely to be right, until the oldest round's Result is due."""
        policy, spec = self._policy, self._spec
        while not oldest.future.done() and policy.works_ahead(self._model.rounds_in_flight):
            sent = self._sent_end - len(spec.tokens)
            elapsed_s = time.monotonic() - oldest.sent_s
            branch: int | None = None
            plan = policy.ahead(spec, sent, elapsed_s, alternatives=self.current.session.takes_alternatives)
            if plan is None and policy.send_ahead(spec, sent, len(self._in_flight)):
                self.send()
                continue
            if plan is None and (other := policy.branch(spec, sent, elapsed_s)) is not None:
                branch, plan = other
                spec.aim(sent)
            if plan is None:
                return
            turn = await self._model.turn(spec, None, plan, branch=branch)
            policy.learn(turn)
            place = "tail" if branch is None else "branch"
            self._link.metrics.drafts_ahead.labels(place).inc(turn.drafts)
            if not turn.drafts and branch is None:
                sent = self._sent_end - len(spec.tokens)
                if policy.send_ahead(spec, sent, len(self._in_flight)):
                    self.send()
                return

    def _keep_accounts(self, turn: Turn) -> None:
        """Keep the accounts of a judged round."""
        spec, stats = self._spec, self.request.stats
        accepted = sum(right for _, right in turn.judged)
        stats.alternatives += turn.aside
        stats.alternatives_accepted += turn.alternative
        self._link.saw_alternatives(turn.aside, turn.alternative)
        self._policy.learn(turn)
        stats.accepted_tokens += accepted
        stats.draft_tokens += accepted + turn.dropped
        stats.refusals += turn.refused
        self._link.saw_drafts(accepted, accepted + turn.dropped)
        if turn.fresh:
            held = len(spec.tokens) - 1 - turn.alternative  # an alternative is in nobody's cache
            self.current.session.rollback(held)
            self._in_flight.clear()
            self._sent_end = min(self._sent_end, held)
        self.current.tokens = spec.tokens[: spec.cached]
        self.current.shallow = spec.cached

    def _forget_drafts(self) -> None:
        """The cloud lost what it held: go on from the certain tokens alone."""
        self._in_flight.clear()
        self._spec.restart()
        self._sent_end = 0

    def end(self) -> None:
        """Keep the conversation for its next turn, or end it where too much is still under way."""
        if self.conversation is None:
            return
        self._count_bytes()
        session = self.conversation.session
        if session.unanswered > 1 and not self._in_flight:
            # A cancelled upload: the cloud should not compute the rest of it.
            self._conversations.discard(self.conversation)
            return
        if session.unanswered:
            session.rollback(len(self.conversation.tokens))
        self._conversations.put(self.conversation)

    async def _upload_once(self) -> torch.Tensor | None:
        """One try; None if the session was evicted on the way."""
        conversation = self.current
        total = len(self._spec.tokens)
        conversation.tokens = list(self._spec.tokens)
        window = max(2, conversation.session.limits.max_inflight_steps)
        sent: deque[asyncio.Future[StepResult]] = deque()
        deep: torch.Tensor | None = None
        start = min(conversation.held, total - 1)
        ends = varying_ends(start, total, lambda position: self._chunk_at(position, total))
        for end in cut_at(ends, conversation.borders, start):
            hidden = await self._shallow(start, end)
            sent.append(self._submit(start, hidden, LAST if end == total else NONE))
            start = end
            if end == total and self._policy.drafting:
                self._model.prepare_drafts(conversation.drafting, list(self._spec.tokens))
            # The next chunk's shallow pass runs while this one travels and is computed in the cloud.
            while sent and (sent[0].done() or len(sent) >= window or end == total):
                result = await sent.popleft()
                if result.stale:
                    return None
                deep = self._take(result)
        self._sent_end = total
        return deep

    async def _shallow(self, start: int, end: int) -> torch.Tensor:
        conversation = self.current
        ids = conversation.tokens[start:end]
        # What the drafter knows of the answer so far is worth more than what an upload could tell it again.
        state = None if self.request.stats.completion_tokens else conversation.drafting
        hidden = await self._with_room(lambda: self._model.shallow(conversation.sequence, ids, start, state))
        conversation.shallow = self._spec.cached = end
        return hidden

    def _submit(
        self, start: int, hidden: torch.Tensor, want: Want, alternatives: tuple[int, ...] = ()
    ) -> asyncio.Future[StepResult]:
        request_id = "" if self._announced else self.request.request_id
        self._announced = True
        decode = self.current.decodes(start)
        return self.current.session.submit(
            start, hidden, want, request_id, decode=decode, alternatives=alternatives
        )

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

    async def _reopen(self, error: HatError) -> None:
        """Replace a session that has ended, where another one can do better; raise the error otherwise."""
        if isinstance(error, CloudOverloaded):
            await self._reopen_when_there_is_room(error)
        elif isinstance(error, CloudUnavailable):
            await self._recover(error)
        else:
            raise error

    async def _reopen_when_there_is_room(self, error: CloudOverloaded) -> None:
        if self.current.session.session_id:  # the work was accepted once, so it is worth waiting for
            wait_s = (error.retry_after_s or 1.0) * random.uniform(0.5, 1.5)
        elif self._conversations.evict_one():  # our own idle sessions may be what fills the cloud
            wait_s = 0.05
        else:
            raise error
        self._count_eviction()
        await asyncio.sleep(wait_s)
        self._take_session(self._open_session(None))

    async def _recover(self, error: CloudUnavailable) -> None:
        """Reach the cloud again: with the session where it still has it, else with a new one.

        Raises:
            HatError: it cannot be reached in time, does not take us back, or was lost too often.
        """
        stats, persistence, lost = self.request.stats, self._persistence, self.current.session
        if stats.resumes >= persistence.max_recoveries:
            raise CloudUnavailable(
                f"{error}; it was lost {stats.resumes + 1} times during this request, which is too often"
            ) from error
        begun = stats.rounds or lost.session_id
        patience_s = persistence.reconnect_for_s
        if not patience_s:
            raise error
        session, _ = await self._recovery.replace(
            lost, patience_s if begun else min(patience_s, OPENING_FOR_S)
        )
        stats.resumes += 1
        self._take_session(session)

    def _take_session(self, session: CloudSession) -> None:
        self._count_bytes()
        self.current.session = session
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
