"""What goes into a pass, and who loses pages when they run out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hat_runtime.cloud.scheduler import Plan, Scheduler, SchedulerConfig
from hat_runtime.cloud.session import Session, StepWork, Want
from hat_runtime.model.pages import KvCache


class Bench:
    """Sessions on a small cache; times are given, nothing is computed."""

    def __init__(self, num_pages: int = 100, **config: Any) -> None:
        self.cache = KvCache(
            layers=1,
            kv_heads=1,
            head_dim=1,
            num_pages=num_pages,
            page_tokens=1,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self.scheduler = Scheduler(self.cache, SchedulerConfig(**config))
        self.sessions: list[Session] = []

    def session(self, committed: int = 0, last_active: float = 100.0) -> Session:
        session = Session(f"s{len(self.sessions)}", 1000, lambda _: None, last_active=last_active)
        self.cache.reserve(session.sequence, committed)
        session.sequence.length = committed
        self.sessions.append(session)
        return session

    def queue(
        self,
        session: Session,
        n: int,
        arrived: float = 0.0,
        start: int | None = None,
        epoch: int = 0,
        want: Want = Want.LAST,
    ) -> None:
        if start is None:
            start = session.queue[-1].start_pos + session.queue[-1].n if session.queue else session.committed
        session.queue.append(StepWork(epoch, start, want, torch.zeros(n, 1), arrived))

    def plan(self) -> Plan:
        return self.scheduler.plan(self.sessions, now=100.0)


def rows(plan: Plan) -> dict[str, int]:
    return {planned.session.id: planned.rows for planned in plan.passes}


def test_prompts_have_no_more_rows_than_they_may() -> None:
    """Also where a short chunk is followed by a longer one, and where little of a chunk is left."""
    bench = Bench(max_batch_tokens=100)
    prompt, tail, short, late = bench.session(), bench.session(10), bench.session(5), bench.session(7)
    bench.queue(prompt, 64)
    bench.queue(tail, 3)
    bench.queue(tail, 90)
    bench.queue(short, 2)
    bench.queue(late, 64)
    late.queue[0].done = 61
    plan = bench.scheduler.plan(bench.sessions, 100.0, prompt_rows=12)
    assert rows(plan) == {"s1": 16, "s2": 2, "s0": 12}


def test_drafts_are_no_prompt_however_many() -> None:
    bench = Bench(max_batch_tokens=100)
    prompt, answer = bench.session(), bench.session(10)
    bench.queue(prompt, 64)
    bench.queue(answer, 40, want=Want.ALL, arrived=1.0)
    plan = bench.scheduler.plan(bench.sessions, 100.0, prompt_rows=12)
    assert list(rows(plan).items()) == [("s1", 40), ("s0", 12)]


def test_a_prompt_that_gets_ahead_is_not_refused_for_pages() -> None:
    bench = Bench(num_pages=10, max_page_wait_s=5.0)
    held, prompt = bench.session(8, last_active=100.0), bench.session()
    bench.queue(prompt, 40, arrived=90.0)
    prompt.queue[0].last_pass = 96.0
    assert held.sequence.pages
    assert bench.plan().refused is None
    prompt.queue[0].last_pass = 94.0
    assert bench.plan().refused is prompt


def test_a_step_with_alternatives_is_not_divided() -> None:
    bench = Bench(max_batch_tokens=6)
    one = bench.session(10)
    bench.queue(one, 4)
    bench.queue(one, 3)
    one.queue[1].alternatives, one.queue[1].hidden = (15, 16), torch.zeros(5, 1)
    assert [piece.last for piece in bench.plan().passes[0].pieces] == [4]
    one.queue.popleft()
    one.sequence.length = 14
    (planned,) = bench.plan().passes
    assert (planned.rows, planned.aside) == (5, (15, 16))


def test_short_steps_go_first_and_the_prompt_fills_the_budget() -> None:
    bench = Bench(max_batch_tokens=20)
    prompt, first, second = bench.session(), bench.session(5), bench.session(5)
    bench.queue(prompt, 64, arrived=1.0)
    bench.queue(first, 1, arrived=3.0)
    bench.queue(second, 4, arrived=2.0)
    assert rows(bench.plan()) == {"s2": 4, "s1": 1, "s0": 15}


def test_prompts_take_turns_by_arrival() -> None:
    bench = Bench(max_batch_tokens=32)
    early, late = bench.session(), bench.session()
    bench.queue(late, 30, arrived=2.0)
    bench.queue(early, 30, arrived=1.0)
    assert list(rows(bench.plan()).items()) == [("s0", 30), ("s1", 2)]


def test_a_step_that_the_engine_will_refuse_does_not_ride_along() -> None:
    bench = Bench(num_pages=1200)
    broken, long = bench.session(4), bench.session(990)
    for session in (broken, long):
        bench.queue(session, 2)
        bench.queue(session, 9)
    broken.queue[1].hidden[3] = float("nan")  # the limit of a session here is 1,000 tokens
    assert rows(bench.plan()) == {"s0": 2, "s1": 2}


def test_adjacent_steps_run_as_one_segment_but_not_across_epochs_or_gaps() -> None:
    bench = Bench()
    adjacent, gap, epochs = (bench.session(4) for _ in range(3))
    for session in (adjacent, gap, epochs):
        bench.queue(session, 2)
    bench.queue(adjacent, 3)
    bench.queue(gap, 3, start=2)
    bench.queue(epochs, 3, epoch=1)
    assert rows(bench.plan()) == {"s0": 5, "s1": 2, "s2": 2}


def test_pages_come_from_the_longest_idle_session_first() -> None:
    bench = Bench(num_pages=30)
    needy = bench.session(5)
    bench.session(10, last_active=90.0)
    oldest = bench.session(10, last_active=50.0)
    bench.queue(needy, 8)
    plan = bench.plan()
    assert plan.evicted == [oldest]
    assert rows(plan) == {"s0": 8}
    bench.cache.check(s.sequence for s in bench.sessions)


def test_an_active_session_loses_pages_only_to_an_older_one() -> None:
    bench = Bench(num_pages=20)
    older, younger = bench.session(10), bench.session(10)
    bench.queue(younger, 5, arrived=99.0)
    plan = bench.plan()
    assert (plan.passes, plan.evicted, plan.refused) == ([], [], None), "it waits for the older one"
    bench.queue(older, 5, arrived=99.5)
    younger.starved = False
    plan = bench.plan()
    assert rows(plan) == {"s0": 5}
    assert plan.evicted == [younger]


def test_who_waits_too_long_for_pages_is_refused_the_youngest_first() -> None:
    bench = Bench(num_pages=20, max_page_wait_s=10.0)
    bench.session(12)
    second, third = bench.session(4), bench.session(4)
    for session in (second, third):
        session.evictions = 8
        bench.queue(session, 5, arrived=90.0)
    plan = bench.plan()
    assert plan.passes == []
    assert plan.refused is third


def test_a_session_that_was_preempted_often_enough_is_left_alone() -> None:
    bench = Bench(num_pages=20, max_evictions=2)
    older, younger = bench.session(10), bench.session(10)
    younger.evictions = 2
    bench.queue(older, 5)
    assert bench.plan().evicted == []


def test_who_waited_for_pages_goes_first_next_time() -> None:
    bench = Bench(num_pages=20, max_batch_tokens=8)
    first, second = bench.session(2), bench.session(2)
    bench.queue(first, 4, arrived=1.0)
    bench.queue(second, 8, arrived=2.0)
    second.starved = True
    assert next(iter(rows(bench.plan()))) == "s1"


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_a_pass_never_exceeds_the_budget(budget: int) -> None:
    bench = Bench(max_batch_tokens=budget)
    for n in (1, 2, 17, 40):
        bench.queue(bench.session(1), n)
    assert sum(rows(bench.plan()).values()) == min(budget, 60)


def test_sessions_without_a_stream_give_way_first() -> None:
    """Before one that is idle for longer; and it is not held against them after a resume."""
    bench = Bench(num_pages=10, idle_after_s=1.0)
    idle = bench.session(committed=4, last_active=0.0)
    lost = bench.session(committed=4, last_active=100.0)
    lost.lost = 100.0
    busy = bench.session()
    bench.queue(busy, 5)
    plan = bench.plan()
    assert (plan.evicted, rows(plan)) == ([lost], {busy.id: 5})
    assert (lost.evictions, lost.idle_evictions, len(idle.sequence.pages)) == (0, 0, 4)
