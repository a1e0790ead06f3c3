"""Arrivals and prompts of the simulator."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests import benchmark_modules  # noqa: F401

from fleet.workload import CNN_DM, SPEC_BENCH, Lengths, poisson_requests  # isort: skip


@pytest.mark.parametrize("lengths", [SPEC_BENCH, CNN_DM], ids=lambda lengths: lengths.name)
def test_prompts_are_as_long_as_published(lengths: Lengths) -> None:
    rng = random.Random(1)
    drawn = np.array([lengths.draw(rng) for _ in range(20_000)])
    assert drawn.mean() == pytest.approx(lengths.mean, rel=0.03)
    assert np.percentile(drawn, 90) == pytest.approx(lengths.p90, rel=0.03)


def test_requests_come_at_their_rate_to_all_devices() -> None:
    requests = poisson_requests(
        random.Random(3), SPEC_BENCH, devices=10, per_s=5.0, duration_s=1000.0, answer_tokens=7
    )
    times = [request.arrival_s for request in requests]
    assert times == sorted(times)
    assert len(times) == pytest.approx(5000, rel=0.05)
    assert np.diff(times).std() == pytest.approx(0.2, rel=0.1), "exponential: as spread as long"
    counts = np.bincount([request.device for request in requests], minlength=10)
    assert counts.min() > 400
    assert {request.answer_tokens for request in requests} == {7}


def test_no_requests_without_devices() -> None:
    with pytest.raises(ValueError, match=r"0 devices, 1\.0 requests/s"):
        poisson_requests(random.Random(0), SPEC_BENCH, devices=0, per_s=1.0, duration_s=1.0, answer_tokens=1)
