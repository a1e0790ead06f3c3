"""Tenants share passes and pages, and every Step comes to an end: the real scheduler over random loads."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hat_runtime.cloud.scheduler import Plan, Scheduler, SchedulerConfig
from hat_runtime.cloud.session import Session, StepWork, Want
from hat_runtime.control.quotas import Limits, Quotas
from hat_runtime.model.pages import KvCache

PASS_S = 0.05


@dataclass
class Device:
    """Uploads a prompt, then decodes, some rows a Step; starts again where the cloud gave its cache away."""

    session: Session
    prompt: int
    answer: int
    """Decode Steps that it wants answered; those of uploads that were lost do not count."""
    rows: int = 1
    away_s: float = 0.0
    due: float = 0.0
    fed: bool = False
    """Its prompt is in the cloud, or on its way."""
    done: bool = False
    """It wants nothing more."""

    def feed(self, now: float) -> None:
        """Queue what the device sends now."""
        queue = self.session.queue
        if self.session.lost_pages:
            self.session.lost_pages, self.fed = False, False
        if queue or now < self.due or self.done:
            return
        if self.fed:
            queue.append(work(self.session.committed, self.rows, now, Want.ALL))
        else:
            queue.append(work(0, self.prompt, now, Want.LAST))
            self.fed = True


def work(start: int, n: int, arrived: float, want: Want) -> StepWork:
    return StepWork(0, start, want, torch.zeros(n, 1), arrived)


@dataclass
class Cloud:
    """The engine's part around a real scheduler and a real cache; a pass takes 50 ms and computes nothing."""

    pages: int
    quotas: Quotas = field(default_factory=Quotas)
    config: dict[str, Any] = field(default_factory=dict)
    devices: list[Device] = field(default_factory=list)
    now: float = 1000.0
    rows: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)
    evictions: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.cache = KvCache(
            layers=1,
            kv_heads=1,
            head_dim=1,
            num_pages=self.pages,
            page_tokens=1,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self.scheduler_config = SchedulerConfig(quotas=lambda: self.quotas, **self.config)
        self.scheduler = Scheduler(self.cache, self.scheduler_config)

    def device(self, tenant: str, prompt: int, answer: int, **fields: Any) -> Device:
        name = f"{tenant}-{len(self.devices)}"
        session = Session(name, 10**6, lambda _: None, tenant=tenant, device=name, last_active=self.now)
        self.devices.append(Device(session, prompt, answer, **fields))
        return self.devices[-1]

    @property
    def sessions(self) -> list[Session]:
        return [device.session for device in self.devices]

    def step(self) -> Plan:
        """Everybody sends what is due, then one pass."""
        for device in self.devices:
            had = len(device.session.queue)
            device.feed(self.now)
            if len(device.session.queue) > had:
                device.session.last_active = self.now
        for session in self.sessions:
            if session.queue and session.queue[0].start_pos < session.committed and not session.queue[0].done:
                self.cache.truncate(session.sequence, session.queue[0].start_pos)
        plan = self.scheduler.plan(self.sessions, self.now)
        self.cache.check(session.sequence for session in self.sessions)
        assert sum(one.rows for one in plan.passes) <= self.scheduler_config.max_batch_tokens
        for session in plan.evicted:
            self.evictions[session.id] += bool(session.queue)
            session.lost_pages = True
            session.queue.clear()
        for planned in plan.passes:
            for piece in planned.pieces:
                piece.work.last_pass = self.now
        if plan.refused is not None:
            self.refused.append(plan.reason)
            self.cache.release(plan.refused.sequence)
            self.devices = [device for device in self.devices if device.session is not plan.refused]
        self.now += PASS_S
        for planned in plan.passes:
            self._complete(planned)
        return plan

    def _complete(self, planned: Any) -> None:
        session = planned.session
        self.rows[session.tenant] += planned.rows
        session.sequence.length = planned.start + planned.rows
        (piece,) = planned.pieces
        piece.work.done = piece.last
        if not piece.work.left:
            session.queue.popleft()
            session.last_active = self.now
            for device in self.devices:
                if device.session is session:
                    device.answer -= piece.work.want is Want.ALL
                    device.done = not device.answer
                    device.due = self.now + device.away_s


def named(**limits: Any) -> Quotas:
    return Quotas(Limits(**limits))


def test_ten_sessions_get_no_more_than_one() -> None:
    cloud = Cloud(10**5, config={"max_batch_tokens": 64})
    for _ in range(10):
        cloud.device("greedy", 5000, 0)
    cloud.device("modest", 5000, 0)
    for _ in range(60):
        cloud.step()
    assert abs(cloud.rows["greedy"] - cloud.rows["modest"]) <= 64


def test_weights_divide_what_there_is() -> None:
    cloud = Cloud(10**5, Quotas(tenants={"big": Limits(weight=3)}), {"max_batch_tokens": 64})
    for tenant in ("big", "small", "small"):
        cloud.device(tenant, 8000, 0)
    for _ in range(80):
        cloud.step()
    assert cloud.rows["big"] / cloud.rows["small"] == pytest.approx(3, rel=0.1)


def test_who_comes_later_does_not_get_what_it_has_missed() -> None:
    cloud = Cloud(10**5, config={"max_batch_tokens": 64})
    cloud.device("early", 9000, 0)
    for _ in range(30):
        cloud.step()
    cloud.device("late", 9000, 0)
    cloud.rows.clear()
    for _ in range(20):
        cloud.step()
    assert abs(cloud.rows["early"] - cloud.rows["late"]) <= 64


def test_who_decodes_does_not_hold_back_who_computes_a_prompt() -> None:
    cloud = Cloud(10**5, config={"max_batch_tokens": 64})
    cloud.device("prompts", 40_000, 0)
    cloud.device("decodes", 1, 10**6)
    for _ in range(200):
        cloud.step()
    cloud.device("late", 9000, 0)
    cloud.rows.clear()
    for _ in range(40):
        cloud.step()
    assert abs(cloud.rows["prompts"] - cloud.rows["late"]) <= 64


def test_a_flood_of_short_steps_leaves_room_for_a_prompt() -> None:
    cloud = Cloud(10**5, config={"max_batch_tokens": 32, "max_passed_over": 4})
    for _ in range(40):
        cloud.device("flood", 1, 10**6)
    prompt = cloud.device("prompt", 160, 0)
    for _ in range(60):
        cloud.step()
    assert prompt.session.committed == 160


def test_a_tenant_s_answers_do_not_use_up_the_rate_that_its_prompt_needs() -> None:
    """Beside another tenant's prompts, which have room."""
    quotas = Quotas(tenants={"slow": Limits(tokens_per_second=100, burst_tokens=10)})
    cloud = Cloud(10**5, quotas, {"max_batch_tokens": 64})
    cloud.device("free", 10**5, 0)
    for _ in range(4):
        cloud.device("slow", 1, 10**6, rows=8)
    cloud.step()
    prompt = cloud.device("slow", 60, 0)
    for _ in range(200):
        cloud.step()
    assert prompt.session.committed == 60


def test_a_rate_delays_its_own_tenant_only() -> None:
    cloud = Cloud(
        10**5,
        Quotas(tenants={"slow": Limits(tokens_per_second=40, burst_tokens=20)}),
        {"max_batch_tokens": 64},
    )
    for tenant in ("slow", "slow", "free"):
        cloud.device(tenant, 1, 10**6, rows=2)
    for _ in range(200):  # 10 s
        cloud.step()
    assert 40 * 10 - 4 <= cloud.rows["slow"] <= 20 + 40 * 10 + 4
    assert cloud.rows["free"] == 1 + 2 * 199


def test_a_device_s_rate_is_its_own() -> None:
    cloud = Cloud(10**5, Quotas(device_default=Limits(tokens_per_second=20, burst_tokens=1)))
    for _ in range(3):
        cloud.device("one", 1, 10**6, rows=4)
    for _ in range(200):
        cloud.step()
    assert cloud.rows["one"] == pytest.approx(3 * 20 * 10, rel=0.05)


def test_a_tenant_within_its_share_takes_pages_from_one_beyond() -> None:
    """The one beyond is older: alone it would win."""
    cloud = Cloud(100, config={"max_batch_tokens": 64})
    for _ in range(3):
        cloud.device("greedy", 30, 10**6)
    cloud.step(), cloud.step()
    small = cloud.device("modest", 40, 10**6)
    while small.session.committed < 40:
        cloud.step()
    assert sum(cloud.evictions.values()) >= 1
    for _ in range(9):
        cloud.step()
    assert small.session.committed >= 48
    assert cloud.evictions[small.session.id] == 0


def test_a_share_of_the_pages_is_kept() -> None:
    cloud = Cloud(100, Quotas(tenants={"bounded": Limits(kv_share=0.3)}))
    cloud.device("free", 10, 10**6)
    for _ in range(2):
        cloud.device("bounded", 20, 5)
    for _ in range(40):
        cloud.step()
        assert sum(len(s.sequence.pages) for s in cloud.sessions if s.tenant == "bounded") <= 30
    assert [device.answer for device in cloud.devices[1:]] == [0, 0]


def test_a_step_beyond_a_share_is_refused_with_its_name() -> None:
    cloud = Cloud(100, named(kv_share=0.3))
    cloud.device("t", 40, 1)
    while not cloud.refused:
        cloud.step()
        assert cloud.now < 1000 + 12
    assert "tenant 't'" in cloud.refused[0]
    assert "kv_share=0.3" in cloud.refused[0]


def test_a_wait_for_pages_ends_while_others_run() -> None:
    cloud = Cloud(40, config={"max_evictions": 0})
    busy = cloud.device("a", 10, 10**6)
    busy.rows = 1
    cloud.device("a", 20, 10**6, away_s=0.2)
    late = cloud.device("a", 30, 1)
    cloud.step()
    for device in cloud.devices[:2]:
        device.session.evictions = 1
    began = cloud.now
    while late in cloud.devices and cloud.now < began + 40:
        for device in cloud.devices[:2]:  # both hold what they have and run on
            if device.fed and device.session.committed > 20:
                cloud.cache.truncate(device.session.sequence, 20)
        cloud.step()
    assert late not in cloud.devices
    assert "is full" in cloud.refused[0]


loads = st.lists(
    st.tuples(
        st.sampled_from("ab"),
        st.integers(1, 60),
        st.integers(1, 12),
        st.integers(1, 6),
        st.sampled_from([0.0, 0.2, 1.5]),
    ),
    min_size=1,
    max_size=5,
)
limits = st.builds(
    Limits,
    tokens_per_second=st.none() | st.floats(20, 200),
    kv_share=st.none() | st.floats(0.3, 1),
    weight=st.sampled_from([0.5, 1.0, 4.0]),
)


@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(loads, st.integers(30, 200), st.integers(4, 40), limits, limits)
def test_every_step_comes_to_an_end(
    load: list[tuple[str, int, int, int, float]], pages: int, budget: int, default: Limits, of_b: Limits
) -> None:
    """Done, or its session refused, within a bounded number of passes; and nobody is preempted without end."""
    cloud = Cloud(pages, Quotas(default, {"b": of_b}), {"max_batch_tokens": budget, "max_evictions": 3})
    for tenant, prompt, answer, rows, away_s in load:
        cloud.device(tenant, prompt, answer, rows=rows, away_s=away_s)
    rates = [one.tokens_per_second for one in (default, of_b) if one.tokens_per_second is not None]
    queued = sum(max(prompt, rows) for _, prompt, _, rows, _ in load)
    # Others' rows, with room for prompts in every fifth pass; and what a rate asks for.
    turns = 5 * (len(load) + 4 * queued / budget) + 20
    throttled_s = max((2 * (queued + budget) / rate for rate in rates), default=0.0)
    longest_s = cloud.scheduler_config.max_starved_s + turns * PASS_S + throttled_s
    waited: deque[float] = deque([0.0])
    while any(device.answer for device in cloud.devices):
        cloud.step()
        heads = [session.queue[0] for session in cloud.sessions if session.queue]
        waited.append(max((cloud.now - max(one.arrived, one.last_pass) for one in heads), default=0.0))
        assert waited[-1] <= longest_s
        assert len(waited) < 8000
    assert max(cloud.evictions.values(), default=0) <= cloud.scheduler_config.max_evictions


def test_preemption_ends() -> None:
    """Two that need more than there is, and are never idle: each Step still comes to an end."""
    cloud = Cloud(50, config={"max_evictions": 3, "max_batch_tokens": 16})
    for tenant in "ab":
        cloud.device(tenant, 30, 15, away_s=0.06)
    for _ in range(3000):
        cloud.step()
    assert not any(device.answer for device in cloud.devices)
    assert max(cloud.evictions.values(), default=0) <= 3
