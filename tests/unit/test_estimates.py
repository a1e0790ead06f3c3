from __future__ import annotations

import pytest

from hat_runtime.device.estimates import Acceptance, LinkEstimate


def test_steps_over_a_steady_link_give_its_figures() -> None:
    rtt, rate, cloud = 0.020, 5e6, 0.030
    estimate = LinkEstimate()
    for _ in range(20):
        estimate.add(1024, rtt + cloud, cloud)
        estimate.add(200_000, 200_000 / rate + rtt + cloud, cloud)
    assert estimate.rtt_s == pytest.approx(rtt)
    assert estimate.uplink_bytes_per_s == pytest.approx(rate)


def test_the_past_weighs_four_fifths() -> None:
    estimate = LinkEstimate()
    estimate.add(100, 0.010, 0.0)
    estimate.add(100, 0.020, 0.0)
    assert estimate.rtt_s == pytest.approx(0.012)


def test_what_cannot_be_is_ignored() -> None:
    estimate = LinkEstimate()
    estimate.add(100, 0.010, 0.011)  # the cloud reports more than passed here
    estimate.add(100_000, 0.010, 0.010)
    assert (estimate.rtt_s, estimate.uplink_bytes_per_s) == (0.0, 0.0)


def test_acceptance_is_the_share_of_the_latest_drafts() -> None:
    acceptance = Acceptance()
    acceptance.add(0, 0)
    assert acceptance.rate == 0.0
    acceptance.add(3, 4)
    assert acceptance.rate == pytest.approx(3 / 4)
    for _ in range(1000):
        acceptance.add(1, 4)
    assert acceptance.rate == pytest.approx(1 / 4)
    for _ in range(250):
        acceptance.add(4, 4)
    assert 0.99 < acceptance.rate <= 1
