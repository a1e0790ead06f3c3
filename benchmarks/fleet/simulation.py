"""Runs a fleet for a while and says what its users saw."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fleet.answer import Record
from fleet.costs import CloudCost, DeviceCost, PaperModel
from fleet.device import Device, LinkRates, Way
from fleet.events import Events
from fleet.guesses import mean_acceptance
from fleet.pod import Pod
from fleet.workload import Lengths, Request, poisson_requests

MOST_SESSIONS = 500
"""Of a pod: more wait only where more come than are answered, so the run is given up."""


@dataclass(frozen=True)
class Percentiles:
    """Of a time, in seconds."""

    mean: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Percentiles:
        """Infinite where there is no value."""
        if not len(values):
            return cls(*[float("inf")] * 4)
        p50, p95, p99 = np.percentile(values, (50, 95, 99))
        return cls(float(values.mean()), float(p50), float(p95), float(p99))


@dataclass
class Outcome:
    """What a run gave."""

    records: list[Record] = field(default_factory=list)
    """Of the requests that count, in the order of their end."""
    requests: int = 0
    ended: int = 0
    """All requests, also those that do not count."""
    tokens: int = 0
    failed: int = 0
    evictions: int = 0
    overloaded: bool = False
    """A pod had more than MOST_SESSIONS sessions: given up."""
    busy: float = 0.0
    """Share of the time that pods spent in passes, mean."""
    rows_a_pass: float = 0.0
    passes: int = 0

    def __add__(self, other: Outcome) -> Outcome:
        """Both runs together, as if of two parts of one fleet that have no pod in common."""
        return Outcome(
            self.records + other.records,
            self.requests + other.requests,
            self.ended + other.ended,
            self.tokens + other.tokens,
            self.failed + other.failed,
            self.evictions + other.evictions,
            self.overloaded or other.overloaded,
            (self.busy + other.busy) / 2,
            (self.rows_a_pass * self.passes + other.rows_a_pass * other.passes)
            / max(1, self.passes + other.passes),
            self.passes + other.passes,
        )

    @property
    def ttft(self) -> Percentiles:
        """Times to the first token."""
        return Percentiles.of(np.array([one.ttft_s for one in self.records]))

    @property
    def tbt(self) -> Percentiles:
        """Times between tokens, of all tokens; those of one round share its time."""
        gaps = [gap for one in self.records for gap in one.gaps]
        if not gaps:
            return Percentiles.of(np.array([]))
        return Percentiles.of(np.repeat([took for took, _ in gaps], [tokens for _, tokens in gaps]))

    @property
    def answer_tbt(self) -> Percentiles:
        """Mean times between tokens of answers."""
        return Percentiles.of(np.array([one.tbt_s for one in self.records if one.tokens > 1]))

    @property
    def tokens_a_round(self) -> float:
        """Mean, first tokens apart."""
        rounds = sum(len(one.gaps) for one in self.records)
        return sum(tokens for one in self.records for _, tokens in one.gaps) / max(1, rounds)

    @property
    def chunk_tokens(self) -> float:
        """Median of the sizes that were chosen; 0: prompts were not cut."""
        return float(np.median([one.chunk_tokens for one in self.records])) if self.records else 0.0

    @property
    def prediction_off(self) -> float:
        """Median distance of predicted from seen times to the first token, as a share; NaN without predictions."""
        found = [abs(one.predicted_s / one.ttft_s - 1) for one in self.records if one.predicted_s is not None]
        return float(np.median(found)) if found else float("nan")


def simulate(
    way: Way,
    requests: Sequence[Request],
    *,
    clouds: Sequence[CloudCost],
    kv_tokens: int,
    devices: Sequence[tuple[DeviceCost, LinkRates]],
    hidden_size: int,
    tokens_a_round: float = 2.0,
    warm_s: float = 0.0,
    until_s: float = float("inf"),
    seed: int = 0,
    one_by_one: bool = False,
) -> Outcome:
    """Answer all requests.

    Args:
        way: how devices and pods work.
        requests: in the order of their arrival.
        clouds: cost of each pod; device i belongs to pod i modulo their number.
        kv_tokens: that a pod's cache holds.
        devices: cost and link of each.
        hidden_size: of the model.
        tokens_a_round: what the drafter gives by the rule of the paper (eta 0.6, 6 drafts).
        warm_s: requests before do not count.
        until_s: nor do those after; they keep the others company.
        seed: of the drafts.
        one_by_one: each device answers one request at a time.
    """
    events, outcome = Events(), Outcome(requests=len(requests))
    pods = [Pod(events, cost, way.scheduler, kv_tokens) for cost in clouds]
    last_s = requests[-1].arrival_s if requests else 0.0

    def ended(record: Record) -> None:
        outcome.ended += 1
        outcome.tokens += record.tokens
        outcome.failed += record.failed
        outcome.evictions += record.evictions
        if warm_s <= record.request.arrival_s <= until_s and not record.failed:
            outcome.records.append(record)

    acceptance = mean_acceptance(tokens_a_round)
    fleet = [
        Device(
            events,
            pods[number % len(pods)],
            cost,
            link,
            way,
            hidden_size=hidden_size,
            acceptance=acceptance,
            seed=f"{seed}/{number}",
            on_end=ended,
            one_by_one=one_by_one,
        )
        for number, (cost, link) in enumerate(devices)
    ]

    def arrive(index: int) -> None:
        request = requests[index]
        if index + 1 < len(requests):
            events.at(requests[index + 1].arrival_s, arrive, index + 1)
        fleet[request.device].ask(request)
        if max(pod.sessions for pod in pods) > MOST_SESSIONS:
            outcome.overloaded = True
            events.stop()

    if requests:
        events.at(requests[0].arrival_s, arrive, 0)
    events.run()
    for pod in pods:
        pod.check_integrity()
    outcome.busy = sum(pod.busy_s for pod in pods) / max(last_s, events.now, 1e-9) / len(pods)
    outcome.passes = sum(pod.passes for pod in pods)
    outcome.rows_a_pass = sum(pod.rows for pod in pods) / max(1, outcome.passes)
    return outcome


@dataclass(frozen=True)
class PaperFleet:
    """Devices and pods of the paper's kinds, in its proportions, on its links."""

    model: PaperModel
    lengths: Lengths
    devices: int
    pods: int
    requests_s: float
    """Of all devices."""
    answer_tokens: int = 128
    """As the paper's limit."""
    rtt_s: float = 0.004
    """Not published: what is left of 39.4 ms, a round without drafts, when its other parts are taken off."""
    uplink: tuple[float, float] = (5e6, 10e6)
    downlink: tuple[float, float] = (10e6, 15e6)
    """Bytes a second: each device's are drawn evenly between these."""

    def run(
        self, way: Way, *, warm_s: float, measured_s: float, tail_s: float = 5.0, seed: int = 0
    ) -> Outcome:
        """Simulate `warm_s` + `measured_s` + `tail_s` seconds of arrivals; those in the middle count."""
        rng = random.Random(seed)
        kinds = [cost for _, count, cost in self.model.devices for _ in range(count)]
        rng.shuffle(kinds)
        devices = [
            (
                kinds[number % len(kinds)],
                LinkRates(rng.uniform(*self.uplink), rng.uniform(*self.downlink), self.rtt_s),
            )
            for number in range(self.devices)
        ]
        requests = poisson_requests(
            rng,
            self.lengths,
            devices=self.devices,
            per_s=self.requests_s,
            duration_s=warm_s + measured_s + tail_s,
            answer_tokens=self.answer_tokens,
        )
        return simulate(
            way,
            requests,
            clouds=[self.model.cloud] * self.pods,
            kv_tokens=self.model.kv_tokens,
            devices=devices,
            hidden_size=self.model.hidden_size,
            tokens_a_round=self.model.tokens_a_round,
            warm_s=warm_s,
            until_s=warm_s + measured_s,
            seed=seed,
        )
