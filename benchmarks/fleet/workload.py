"""Requests: when they come, to which device, how long they are."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from fleet.guesses import Round


@dataclass(frozen=True)
class Request:
    """One prompt."""

    arrival_s: float
    device: int
    prompt_tokens: int
    answer_tokens: int
    rounds: tuple[Round, ...] = ()
    """Of a recorded answer; empty: drafts are drawn."""


@dataclass(frozen=True)
class Lengths:
    """Prompts of a data set."""

    name: str
    draw: Callable[[random.Random], int]
    mean: float
    """As published."""
    p90: float
    """90th percentile, as published."""


def _spec_bench(rng: random.Random) -> int:
    """A third of Spec-Bench (summaries, retrieval) is long, the rest short: a mixture with the published figures."""
    long = rng.random() < 1 / 3
    tokens = rng.gauss(833.6, 110.0) if long else rng.lognormvariate(4.575, 0.5)
    return max(8, round(tokens))


def _cnn_dm(rng: random.Random) -> int:
    """The log-normal distribution with the published mean and 90th percentile."""
    return max(8, min(3000, round(rng.lognormvariate(6.805, 0.526))))


SPEC_BENCH = Lengths("SpecBench", _spec_bench, 351.2, 891)
CNN_DM = Lengths("CNN/DM", _cnn_dm, 1036.6, 1772)


def poisson_requests(
    rng: random.Random,
    lengths: Lengths,
    *,
    devices: int,
    per_s: float,
    duration_s: float,
    answer_tokens: int,
) -> list[Request]:
    """Requests to random devices, in the order of their arrival.

    Args:
        rng: source of chance.
        lengths: of prompts.
        devices: how many there are.
        per_s: requests a second of all of them, above 0.
        duration_s: no request comes later.
        answer_tokens: tokens of every answer.

    Raises:
        ValueError: no device, or no requests.
    """
    if devices < 1 or per_s <= 0 or answer_tokens < 1:
        raise ValueError(f"{devices} devices, {per_s} requests/s, {answer_tokens} tokens an answer")
    found, now = [], rng.expovariate(per_s)
    while now < duration_s:
        found.append(Request(now, rng.randrange(devices), lengths.draw(rng), answer_tokens))
        now += rng.expovariate(per_s)
    return found
