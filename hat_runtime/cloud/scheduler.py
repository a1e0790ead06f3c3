"""Which rows of which sessions go into the next pass.

Steps of answers (verification, decoding) and short prompts go first, then the chunks of long ones fill what is left of
the token budget, or as much of it as others' decoding allows. Adjacent queued Steps of one session run as one segment.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hat_runtime.cloud.session import Session, StepWork, Want, violation
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
    max_evictions: int = 8
    """A session that lost its pages this often while it was active is not preempted again."""

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


@dataclass
class Plan:
    """What the engine does next."""

    passes: list[Planned] = field(default_factory=list)
    evicted: list[Session] = field(default_factory=list)
    refused: Session | None = None
    """Has waited too long for pages that nobody frees: its stream must end."""


class Scheduler:
    """Plans passes over sessions whose queue heads are valid (see Engine)."""

    def __init__(self, cache: KvCache, config: SchedulerConfig) -> None:
        self._cache = cache
        self._config = config

    def plan(self, sessions: Iterable[Session], now: float, prompt_rows: int | None = None) -> Plan:
        """Choose the next pass, and reserve its pages.

        Args:
            sessions: all sessions, the longest open first.
            now: monotonic seconds.
            prompt_rows: most rows of prompt chunks, at least 1; None: as many as there is room for.
        """
        everyone = list(sessions)
        waiting = sorted((s for s in everyone if s.queue), key=self._precedence)
        plan = Plan()
        budget = self._config.max_batch_tokens
        of_prompts = budget if prompt_rows is None else prompt_rows
        for session in waiting:
            if budget <= 0:
                break
            head = session.queue[0]
            is_prompt = self._config.is_prompt(head)
            if session in plan.evicted or (is_prompt and of_prompts <= 0):
                continue
            # Behind a short Step there may be a longer one.
            most = of_prompts if is_prompt else max(of_prompts, self._config.short_tokens, head.left)
            planned = self._take(session, min(budget, most))
            if self._make_room(planned, plan, everyone, now):
                session.starved = False
                self._cache.reserve(session.sequence, planned.start + planned.rows)
                plan.passes.append(planned)
                budget -= planned.rows
                of_prompts -= planned.rows if is_prompt else 0
            else:
                session.starved = True
        if not plan.passes:
            patience = now - self._config.max_page_wait_s
            stuck = [s for s in waiting if max(s.queue[0].arrived, s.queue[0].last_pass) <= patience]
            plan.refused = max(stuck, key=everyone.index, default=None)
        return plan

    def _precedence(self, session: Session) -> tuple[bool, bool, float]:
        head = session.queue[0]
        return (not session.starved, self._config.is_prompt(head), head.arrived)

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

    def _make_room(self, planned: Planned, plan: Plan, everyone: list[Session], now: float) -> bool:
        """Evict until the pages suffice; False if they cannot."""
        need = self._cache.pages_needed(planned.session.sequence, planned.start + planned.rows)
        if need <= self._cache.free_pages:
            return True
        victims = self._victims(planned.session, plan, everyone, now)
        if need > self._cache.free_pages + sum(len(victim.sequence.pages) for victim in victims):
            return False
        for victim in victims:
            if need <= self._cache.free_pages:
                break
            self._cache.release(victim.sequence)
            plan.evicted.append(victim)
        return True

    def _victims(self, session: Session, plan: Plan, everyone: list[Session], now: float) -> list[Session]:
        """Whose pages `session` may take: sessions without a stream first, then idle ones, the longest idle first, then
        younger ones, youngest first.

        The longest open session can take everybody's, so there is always one that gets ahead.
        """
        in_pass = {id(planned.session) for planned in plan.passes}
        others = [s for s in everyone if s is not session and s.sequence.pages and id(s) not in in_pass]
        limit = now - self._config.idle_after_s
        idle = sorted(
            (s for s in others if self._is_idle(s, limit)), key=lambda s: (s.lost is None, s.last_active)
        )
        younger = [
            s
            for s in reversed(others)
            if not self._is_idle(s, limit)
            and everyone.index(s) > everyone.index(session)
            and s.evictions < self._config.max_evictions
        ]
        return idle + younger

    @staticmethod
    def _is_idle(session: Session, limit: float) -> bool:
        return session.lost is not None or (not session.queue and session.last_active <= limit)
