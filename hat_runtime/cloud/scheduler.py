"""Which rows of which sessions go into the next pass.

Steps of answers (verification, decoding) and short prompts go first, then the chunks of long ones fill what is left of
the token budget, or as much of it as others' decoding allows. Among each kind tenants take turns by what they have had,
so many sessions get no more than one. Adjacent queued Steps of one session run as one segment.

Every Step comes to an end: nobody is passed over for ever (FairShare, `max_passed_over`), preemption is bounded
(`max_evictions`), and so is the wait for pages (`max_page_wait_s`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from hat_runtime.cloud.page_room import Need, PageRoom
from hat_runtime.cloud.session import Session, StepWork, Want, violation
from hat_runtime.cloud.turns import Turns
from hat_runtime.control.quotas import Quotas
from hat_runtime.control.sharing import Courtesy
from hat_runtime.model.pages import KvCache


@dataclass(frozen=True)
class SchedulerConfig:
    """Bounds of one pass and of eviction."""

    max_batch_tokens: int = 512
    """Most rows in one pass."""
    short_tokens: int = 16
    """A prompt's Steps with at most so many tokens go with those of answers: they cost hardly more."""
    courtesy: Courtesy | None = None
    """What prompts leave to sessions that decode; None: they take all that a pass has room for."""
    idle_after_s: float = 1.0
    """A session without work for this long is idle: its pages go first."""
    max_page_wait_s: float = 10.0
    """A Step that has waited this long for pages, with nothing left to run, is refused."""
    max_starved_s: float = 30.0
    """So is one that has waited this long for pages while others ran."""
    max_passed_over: int = 4
    """A prompt that so many passes had no room for goes before short Steps, in half of a pass if they fill it."""
    max_evictions: int = 8
    """A session that lost its pages this often while it was active is not preempted again."""
    quotas: Callable[[], Quotas] = Quotas
    """Gives the limits of tenants and devices; asked before each pass."""

    def is_prompt(self, work: StepWork) -> bool:
        """Whether a Step has to leave time to those that decode."""
        return not work.decodes and work.n > self.short_tokens


@dataclass(frozen=True)
class Piece:
    """Rows first <= i < last of a Step."""

    work: StepWork
    first: int
    last: int

    @property
    def wanted(self) -> bool:
        """Whether the device wants a deep state of these rows."""
        want, tokens = self.work.want, self.work.tokens
        judged = tokens is not None and tokens.drafts > 0  # each draft by the row before it
        return judged or want is Want.ALL or (want is Want.LAST and self.last == self.work.n)

    @property
    def aside(self) -> tuple[int, ...]:
        """Positions of the Step's alternatives, which run with its last row."""
        return self.work.alternatives if self.last == self.work.n else ()


@dataclass
class Planned:
    """One session's part of a pass: pieces of adjacent Steps, from position `start` on."""

    session: Session
    start: int
    pieces: list[Piece] = field(default_factory=list)

    @property
    def aside(self) -> tuple[int, ...]:
        """Positions of all pieces' alternatives, which are behind all other rows."""
        return tuple(position for piece in self.pieces for position in piece.aside)

    @property
    def rows(self) -> int:
        """Rows of all pieces, alternatives included."""
        return sum(piece.last - piece.first + len(piece.aside) for piece in self.pieces)

    @property
    def everything(self) -> bool:
        """Nothing is left in the session's queue."""
        last = self.pieces[-1]
        return last.work is self.session.queue[-1] and last.last == last.work.n


@dataclass
class Plan:
    """What the engine does next."""

    passes: list[Planned] = field(default_factory=list)
    evicted: list[Session] = field(default_factory=list)
    refused: Session | None = None
    """Has waited too long for pages that nobody frees: its stream must end."""
    reason: str = ""
    """Why it is refused."""


@dataclass
class _Round:
    """A plan in the making."""

    everyone: Sequence[Session]
    quotas: Quotas
    now: float
    budget: int
    of_prompts: int
    plan: Plan = field(default_factory=Plan)
    starved: dict[int, str] = field(default_factory=dict)
    """id() of the sessions that found no pages, and why."""


class Scheduler:
    """Plans passes over sessions whose queue heads are valid (see Engine)."""

    def __init__(self, cache: KvCache, config: SchedulerConfig) -> None:
        self._cache = cache
        self._config = config
        self._turns = Turns()
        self._rooms = PageRoom(cache, config.idle_after_s, config.max_evictions)
        self._last_pass = -math.inf

    def plan(self, sessions: Iterable[Session], now: float, prompt_rows: int | None = None) -> Plan:
        """Choose the next pass, and reserve its pages.

        Args:
            sessions: all sessions, the longest open first.
            now: monotonic seconds.
            prompt_rows: most rows of prompt chunks, at least 1; None: as many as there is room for.
        """
        everyone, quotas, budget = list(sessions), self._config.quotas(), self._config.max_batch_tokens
        waiting = self._turns.begin((one for one in everyone if one.queue), quotas, now)
        this = _Round(everyone, quotas, now, budget, budget if prompt_rows is None else prompt_rows)
        for session in self._in_turn(waiting, this):
            if this.budget <= 0:
                break
            if session not in this.plan.evicted:
                self._add(session, this)
        if not this.plan.passes and now - self._last_pass > self._config.idle_after_s:
            self._last_resort(this)
        if this.plan.passes:
            self._last_pass = now
        served = {
            one.session.tenant for one in this.plan.passes if self._config.is_prompt(one.pieces[0].work)
        }
        for session in waiting:
            session.starved = id(session) in this.starved and session not in this.plan.evicted
            passed_over = self._is_prompt(session) and not session.starved and session.tenant not in served
            session.passed_over = session.passed_over + 1 if passed_over else 0
        everything = {id(one.session) for one in this.plan.passes if one.everything}
        self._turns.end(one for one in waiting if id(one) not in everything and id(one) not in this.starved)
        self._refuse(this)
        return this.plan

    def _in_turn(self, waiting: Sequence[Session], this: _Round) -> Iterator[Session]:
        """Who waited for pages in the last pass goes first, then short Steps, then prompts, unless they waited long."""
        starved = [one for one in waiting if one.starved]
        others = [one for one in waiting if not one.starved]
        short = [one for one in others if not self._is_prompt(one)]
        late = self._config.max_passed_over
        overdue = [one for one in others if self._is_prompt(one) and one.passed_over >= late]
        prompts = [one for one in others if self._is_prompt(one) and one.passed_over < late]
        yield from self._turns.order(starved)
        if overdue:
            room = this.budget - sum(session.queue[0].left for session in short)
            later = max(0, this.of_prompts - max(1, this.budget // 2, room))
            this.of_prompts -= later
            yield from self._turns.order(overdue)
            this.of_prompts += later
        yield from self._turns.order(short)
        yield from self._turns.order(prompts)

    def _add(self, session: Session, this: _Round) -> None:
        """Give a session its part of the pass, if there are rows and pages for it."""
        is_prompt = self._is_prompt(session)
        allowed = self._turns.allowed(session, this.quotas, this.now)
        if allowed <= 0 or (is_prompt and this.of_prompts <= 0):
            return
        if is_prompt:  # a rate's last rows are not worth a debt that its tenant's answers would wait for
            most = min(this.of_prompts, max(allowed, self._config.short_tokens))
        else:  # behind a short Step there may be a longer one
            most = max(this.of_prompts, self._config.short_tokens, session.queue[0].left)
        planned = self._take(session, int(min(this.budget, most)))
        if not self._make_room(planned, this):
            return
        self._cache.reserve(session.sequence, planned.start + planned.rows)
        self._turns.charge(session, planned.rows, this.quotas)
        this.plan.passes.append(planned)
        this.budget -= planned.rows
        this.of_prompts -= planned.rows if is_prompt else 0

    def _make_room(self, planned: Planned, this: _Round, *, last_resort: bool = False) -> bool:
        """Evict until the pages suffice; False if they cannot."""
        session = planned.session
        need = Need(
            session,
            self._cache.pages_needed(session.sequence, planned.start + planned.rows),
            this.everyone,
            {id(one.session) for one in this.plan.passes},
            this.quotas,
            this.now,
            last_resort,
        )
        found = self._rooms.make(need)
        if isinstance(found, str):
            this.starved[id(session)] = found
            return False
        this.starved.pop(id(session), None)
        this.plan.evicted += found
        return True

    def _last_resort(self, this: _Round) -> None:
        """Nobody got ahead for a while: pages go to the longest open session that waits for some."""
        for session in this.everyone:
            if id(session) in this.starved:
                planned = self._take(session, this.budget)
                if self._make_room(planned, this, last_resort=True):
                    self._cache.reserve(session.sequence, planned.start + planned.rows)
                    self._turns.charge(session, planned.rows, this.quotas)
                    this.plan.passes.append(planned)
                return

    def _refuse(self, this: _Round) -> None:
        """Choose one, if any, that has waited for pages too long."""
        config = self._config
        patience = this.now - (config.max_starved_s if this.plan.passes else config.max_page_wait_s)
        stuck = [
            one
            for one in this.everyone
            if one.starved
            and id(one) in this.starved
            and max(one.queue[0].arrived, one.queue[0].last_pass) <= patience
        ]
        if stuck:
            this.plan.refused = stuck[-1]
            this.plan.reason = this.starved[id(stuck[-1])]

    def _is_prompt(self, session: Session) -> bool:
        return self._config.is_prompt(session.queue[0])

    @staticmethod
    def _take(session: Session, budget: int) -> Planned:
        planned = Planned(session, session.queue[0].position)
        end, aside = planned.start, 0
        for work in session.queue:
            if budget <= 0 or work.position != end or work.epoch != session.queue[0].epoch:
                break
            if planned.pieces and (
                violation(session, work, end) is not None
                # Until the pass ends, all alternatives of it take room in the cache.
                or end + work.left + aside + len(work.alternatives) > session.max_tokens
            ):
                break  # the engine refuses it when it is the head: what came before it is answered first
            # A Step with alternatives is not divided: they may stand behind any of its tokens.
            rows = work.left if work.alternatives else min(work.left, budget)
            if planned.pieces and rows > budget:
                break
            piece = Piece(work, work.done, work.done + rows)
            planned.pieces.append(piece)
            budget -= rows + len(piece.aside)  # at most the alternatives of one Step too many
            end += rows
            aside += len(piece.aside)
        return planned
