"""How many pods a fleet needs.

A session stays on its replica, so pods have nothing to do with each other: the devices of one pod are simulated, and a
fleet is as many of these. How unevenly devices fall on pods is drawn for a few of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from fleet.costs import PaperModel
from fleet.device import Way
from fleet.simulation import Outcome, PaperFleet
from fleet.workload import Lengths


@dataclass(frozen=True)
class Target:
    """What users are promised, in seconds."""

    ttft_s: float
    """95 of 100 first tokens come within."""
    tbt_s: float
    """95 of 100 answers have at most so much between tokens, on average."""

    def met(self, outcome: Outcome) -> bool:
        """Whether a run kept it, and answered everything."""
        return (
            not outcome.overloaded
            and not outcome.failed
            and outcome.ttft.p95 <= self.ttft_s
            and outcome.answer_tbt.p95 <= self.tbt_s
        )


@dataclass(frozen=True)
class Load:
    """What each device of a fleet asks."""

    model: PaperModel
    lengths: Lengths
    per_device_s: float
    """Requests a second."""
    warm_s: float
    measured_s: float

    @cache  # noqa: B019 (loads are few and last as long as the program)
    def on_pod(self, way: Way, devices: int, seed: int) -> Outcome:
        """What the users of one pod's devices see."""
        fleet = PaperFleet(self.model, self.lengths, devices, 1, devices * self.per_device_s)
        return fleet.run(way, warm_s=self.warm_s, measured_s=self.measured_s, seed=seed)


def most(fits: Callable[[int], bool], low: int, high: int, step: int) -> int:
    """The largest n, low <= n <= high, that fits, to within `step` - 1; 0 if `low` does not.

    What fits must fit for all that is smaller.
    """
    if not fits(low):
        return 0
    while high - low >= step:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class Need:
    """The pods of a fleet."""

    devices: int
    pods: int
    outcome: Outcome
    """Of the pods that were simulated."""


def pods_needed(load: Load, way: Way, target: Target, devices: int, per_pod: int, sample: int) -> Need:
    """The least number of pods, from `devices` / `per_pod` on, with which a sample of pods meets the target.

    Args:
        load: what devices ask.
        way: how they work.
        target: what is promised.
        devices: of the whole fleet.
        per_pod: devices that one pod serves within the target.
        sample: pods that are simulated, with as many devices as chance gives them.
    """
    pods = math.ceil(devices / per_pod)
    while True:
        outcome = split_outcome(load, way, devices, pods, sample)
        if target.met(outcome):
            return Need(devices, pods, outcome)
        pods += max(1, pods // 50)


def split_outcome(load: Load, way: Way, devices: int, pods: int, sample: int) -> Outcome:
    """What the users of some pods of a fleet see: each device is on one of `pods` pods, by chance."""
    rng = random.Random(f"{devices}/{pods}")
    total = Outcome()
    for seed in range(min(pods, sample)):
        here = sum(rng.random() < 1 / pods for _ in range(devices))
        if here:
            seen = load.on_pod(way, here, seed)
            total = total + seen if total.requests else seen
    return total
