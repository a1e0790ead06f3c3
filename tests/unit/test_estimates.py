from __future__ import annotations

import pytest

from hat_runtime.device.estimates import Acceptance, LinkEstimate


def test_steps_over_a_steady_link_give_its_figures() -> None:
    rtt, rate, cloud = 0.020, 5e6, 0.030
    estimate = LinkEstimate()
    for now in range(20):
        estimate.add(1024, now, now + rtt + cloud, cloud, alone=True)
        estimate.add(200_000, now + 0.5, now + 0.5 + 200_000 / rate + rtt + cloud, cloud, alone=True)
    assert estimate.rtt_s == pytest.approx(rtt)
    assert estimate.uplink_bytes_per_s == pytest.approx(rate)


@pytest.mark.parametrize("cloud_s", [0.001, 0.05], ids=["link-bound", "cloud-bound"])
@pytest.mark.parametrize("chunks", [3, 12])
def test_chunks_that_follow_one_another_tell_the_rate(cloud_s: float, chunks: int) -> None:
    """All are handed over at once; each waits for the link, then for the cloud, and their Results come in order."""
    rtt, rate, size = 0.05, 2e6, 74_000
    estimate = LinkEstimate(rtt_s=rtt)
    arrived = done = 0.0
    for _ in range(chunks):
        arrived += size / rate
        begun = max(done, arrived + rtt / 2)
        done = begun + cloud_s
        estimate.add(size, 0.0, done + rtt / 2, done - arrived - rtt / 2, alone=False)
        assert estimate.uplink_bytes_per_s == pytest.approx(rate)


def test_a_small_chunk_that_looks_fast_moves_the_rate_little() -> None:
    """A round trip that was shorter than usual looks like a link that takes no time."""
    rtt, rate, size = 0.02, 7.5e6, 35_000
    estimate = LinkEstimate(rtt_s=rtt, uplink_bytes_per_s=rate)
    estimate.add(size, 0.0, rtt + 0.0002, 0.0, alone=True)
    assert rate < estimate.uplink_bytes_per_s < 1.25 * rate


@pytest.mark.parametrize("factor", [0.025, 0.3, 3, 40])
def test_another_link_is_known_after_two_chunks(factor: float) -> None:
    rtt, rate, size = 0.02, 1e6, 400_000
    estimate = LinkEstimate(rtt_s=rtt, uplink_bytes_per_s=rate)
    estimate.add(size, 0.0, size / (factor * rate) + rtt, 0.0, alone=True)
    assert estimate.uplink_bytes_per_s != pytest.approx(factor * rate, rel=0.2)  # it may be an outlier
    estimate.add(size, 100.0, 100.0 + size / (factor * rate) + rtt, 0.0, alone=True)
    assert estimate.uplink_bytes_per_s == pytest.approx(factor * rate)


def test_rounds_of_many_bytes_tell_the_round_trip_time_and_not_the_rate() -> None:
    """As wide models have: a round of 3 rows of 8 KiB."""
    rtt, rate, size = 0.05, 2e6, 24_576
    estimate = LinkEstimate(uplink_bytes_per_s=rate)
    for now in range(30):
        travel_s = rtt + 2 * size / rate  # as many bytes come down
        estimate.add(size, now, now + travel_s + 0.03, 0.03, alone=True, chunk=False)
    assert estimate.rtt_s == pytest.approx(rtt)
    assert estimate.uplink_bytes_per_s == rate


def test_a_step_before_the_prompt_was_not_in_its_way() -> None:
    rtt, rate, size = 0.05, 2e6, 74_000
    estimate = LinkEstimate(rtt_s=rtt)
    for submitted in (0.0, 7.0):
        estimate.add(size, submitted, submitted + size / rate + rtt, 0.0, alone=True)
    assert estimate.uplink_bytes_per_s == pytest.approx(rate)


def test_the_past_weighs_four_fifths() -> None:
    estimate = LinkEstimate()
    estimate.add(100, 1.0, 1.010, 0.0, alone=True)
    estimate.add(100, 2.0, 2.020, 0.0, alone=True)
    estimate.add(100, 3.0, 3.500, 0.0, alone=False)
    assert estimate.rtt_s == pytest.approx(0.012)


def test_what_cannot_be_is_ignored() -> None:
    estimate = LinkEstimate()
    estimate.add(100, 1.0, 1.010, 0.011, alone=True)  # the cloud reports more than passed here
    estimate.add(100_000, 1.0, 1.010, 0.010, alone=True)
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
