"""Chunk sizes: within bounds, best by the prediction, monotone where the theory says so, and steady."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hat_runtime.control import limits
from hat_runtime.control.chunk_policy import (
    DEAD_BAND,
    FALLBACK,
    Bounds,
    Conditions,
    balance,
    predicted_ttft,
    predictive,
)
from hat_runtime.control.pass_cost import PassCost

MEGABIT = 1e6 / 8
costs = st.builds(PassCost, st.floats(0, 0.2), st.floats(1e-6, 2e-3), st.floats(0, 1e-6))
conditions = st.builds(
    Conditions,
    row_bytes=st.sampled_from([576.0, 1152.0, 8192.0]),
    uplink_bytes_per_s=st.floats(1e4, 1e9),
    rtt_s=st.floats(0, 0.3),
    shallow=st.builds(PassCost, st.floats(0, 0.01), st.floats(0, 1e-3), st.floats(0, 1e-7)),
    cost=costs,
    wait_s=st.floats(0, 0.2),
    company=st.integers(0, 64),
    pass_tokens=st.sampled_from([32, 128, 512]),
)
bounds = st.builds(lambda a, b: Bounds(min(a, b), max(a, b)), st.integers(1, 2048), st.integers(1, 2048))
lengths = st.integers(1, 4096)


def seen(rate_mbit: float = 20, **fields: float) -> Conditions:
    """The default model on one core (design.md 11) behind a link."""
    usual = Conditions(1152, rate_mbit * MEGABIT, 0.02, PassCost(0.003, 5e-5), PassCost(0.03, 5e-4, 1e-7))
    return replace(usual, **fields)  # type: ignore[arg-type]


@given(conditions, lengths, bounds, st.none() | st.integers(1, 4096))
def test_sizes_are_never_outside_the_bounds(
    now: Conditions, total: int, within: Bounds, current: int | None
) -> None:
    for size in (predictive(now, 0, total, within, current), balance(now, total, within, current)):
        assert within.least <= size <= within.most


@given(conditions, lengths, bounds)
def test_no_candidate_is_predicted_to_be_faster(now: Conditions, total: int, within: Bounds) -> None:
    best = predicted_ttft(now, 0, total, predictive(now, 0, total, within))
    assert best == min(predicted_ttft(now, 0, total, size) for size in within.candidates())


@given(conditions, lengths, bounds, st.integers(1, 2048))
def test_a_size_is_left_only_for_a_gain(now: Conditions, total: int, within: Bounds, current: int) -> None:
    kept = within.clamp(current)
    size = predictive(now, 0, total, within, current)
    if size != kept:
        assert predicted_ttft(now, 0, total, size) < (1 - DEAD_BAND) * predicted_ttft(now, 0, total, kept)
    assert predictive(now, 0, total, within, size) == size


@given(conditions, lengths, bounds, st.none() | st.integers(1, 4096), st.integers(1, 100_000))
def test_a_hint_costs_at_most_the_dead_band_and_stays_within_bounds(
    now: Conditions, total: int, within: Bounds, current: int | None, hint: int
) -> None:
    size = predictive(now, 0, total, within, current, hint)
    assert within.least <= size <= within.most
    least = min(predicted_ttft(now, 0, total, one) for one in within.candidates())
    assert (1 - DEAD_BAND) * predicted_ttft(now, 0, total, size) <= least * (1 + 1e-9)
    assert predictive(now, 0, total, within, size, hint) == size
    papers, own = balance(now, total, within, current, hint=hint), balance(now, total, within)
    assert within.least <= papers <= within.most
    assert abs(papers - own) <= DEAD_BAND * papers


@given(conditions, lengths, bounds, st.integers(1, 4096))
def test_a_hint_that_is_as_good_as_the_best_is_taken_at_the_start(
    now: Conditions, total: int, within: Bounds, hint: int
) -> None:
    hint = within.clamp(hint)
    best = min(predicted_ttft(now, 0, total, one) for one in [*within.candidates(), hint])
    if (1 - DEAD_BAND) * predicted_ttft(now, 0, total, hint) <= best:
        assert predictive(now, 0, total, within, None, hint) == hint


@given(conditions, lengths, bounds, st.floats(1, 10), st.floats(0, 1))
def test_balance_grows_with_rate_and_load(
    now: Conditions, total: int, within: Bounds, faster: float, longer_s: float
) -> None:
    """hat.md 6: X = (w + a / P) / (A / beta - b / P)."""
    size = balance(now, total, within)
    assert balance(replace(now, uplink_bytes_per_s=faster * now.uplink_bytes_per_s), total, within) >= size
    assert balance(replace(now, wait_s=now.wait_s + longer_s), total, within) >= size


@given(conditions, lengths, st.integers(1, 2048), st.floats(1, 10))
def test_a_faster_link_is_never_predicted_to_be_slower(
    now: Conditions, total: int, chunk: int, faster: float
) -> None:
    """Without the cloud's habit of taking whatever has arrived: with it, waiting can pay (Graham's anomaly)."""
    assume(now.pass_tokens >= chunk)
    alone = replace(now, pass_tokens=1 << 30, cost=replace(now.cost, fixed_s=0.0, per_pair_s=0.0), company=0)
    quick = replace(alone, uplink_bytes_per_s=faster * now.uplink_bytes_per_s)
    assert predicted_ttft(quick, 0, total, chunk) <= predicted_ttft(alone, 0, total, chunk) + 1e-9


@given(conditions, lengths, st.integers(1, 2048))
def test_no_prediction_beats_the_limit(now: Conditions, total: int, chunk: int) -> None:
    """picospec.md 4.4, with the parts of these conditions."""
    assert now.cost is not None
    assert now.shallow is not None
    each = (0.0, 0.0, 0.0, now.cost.per_token_s, now.shallow.per_token_s)
    parts = limits.LimitParts(now.row_bytes, now.uplink_bytes_per_s, 1e15, now.rtt_s, *each)
    assert predicted_ttft(now, 0, total, chunk) >= limits.ttft_chunked_limit(parts, total) * (1 - 1e-9)


def test_prediction_of_one_chunk_is_the_sum_of_its_parts() -> None:
    now = seen()
    assert now.cost is not None
    expected = 0.003 + 100 * 5e-5 + 100 * 1152 / (20 * MEGABIT) + 0.02 + now.cost.seconds(100, 100)
    assert predicted_ttft(now, 0, 100, 128) == pytest.approx(expected)
    assert predicted_ttft(replace(now, wait_s=0.03), 0, 100, 128) == pytest.approx(expected + 0.03)


def test_unknown_conditions_change_nothing() -> None:
    for now in (seen(uplink_bytes_per_s=0.0), replace(seen(), cost=None), replace(seen(), shallow=None)):
        assert predictive(now, 0, 2000, Bounds(), 200) == balance(now, 2000, Bounds(), 200) == 200
        assert predictive(now, 0, 2000, Bounds(), 200, 96) == balance(now, 2000, Bounds(), 200, hint=96) == 96
        assert predictive(now, 0, 2000, Bounds()) == balance(now, 2000, Bounds()) == FALLBACK
        with pytest.raises(ValueError, match="not known"):
            predicted_ttft(now, 0, 2000, 128)


def test_noise_does_not_move_a_size() -> None:
    """10 % of noise on everything that is measured."""
    rng, size, changes = random.Random(5), None, 0
    for _ in range(300):

        def off() -> float:
            return rng.uniform(0.9, 1.1)

        usual = seen()
        assert usual.cost is not None
        cost = replace(
            usual.cost, fixed_s=usual.cost.fixed_s * off(), per_token_s=usual.cost.per_token_s * off()
        )
        now = replace(
            usual, cost=cost, uplink_bytes_per_s=usual.uplink_bytes_per_s * off(), rtt_s=usual.rtt_s * off()
        )
        new = predictive(now, 0, 2000, Bounds(), size)
        changes += size is not None and new != size
        size = new
    assert changes <= 2


@pytest.mark.parametrize(("least", "most"), [(0, 10), (20, 10), (-5, -1)])
def test_wrong_bounds_are_refused(least: int, most: int) -> None:
    with pytest.raises(ValueError, match=f"{least} <= {most} does not hold"):
        Bounds(least, most)
