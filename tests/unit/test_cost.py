"""The fit of a pass's cost."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hat_runtime.control.cost import CostFit
from hat_runtime.control.pass_cost import PassCost

SIZES = (1, 4, 8, 64, 128, 256)


def observe(fit: CostFit, cost: PassCost, count: int, rng: random.Random, outliers: float = 0.0) -> None:
    for _ in range(count):
        new, total = rng.choice(SIZES), rng.randrange(256, 4096)
        seconds = cost.seconds(new, total) * rng.uniform(0.95, 1.05)
        fit.observe(new, new * total, seconds * (rng.uniform(3, 20) if rng.random() < outliers else 1.0))


def check(fit: CostFit, cost: PassCost, within: float) -> None:
    found = fit.fit()
    assert found is not None
    for new, total in ((1, 512), (64, 1024), (128, 4096), (256, 300)):
        assert found.seconds(new, total) == pytest.approx(cost.seconds(new, total), rel=within)


@pytest.mark.parametrize("outliers", [0.0, 0.05])
def test_finds_the_cost_behind_noisy_passes_and_follows_a_change(outliers: float) -> None:
    rng = random.Random(1)
    fit = CostFit()
    for cost in (PassCost(0.02, 1e-3, 1e-7), PassCost(0.04, 2e-3, 4e-7), PassCost(0.005, 1e-4)):
        observe(fit, cost, 300, rng, outliers)
        check(fit, cost, 0.15 + 2 * outliers)


def test_one_pass_that_took_a_minute_changes_nothing() -> None:
    rng, cost = random.Random(2), PassCost(0.02, 1e-3)
    fit = CostFit()
    observe(fit, cost, 100, rng)
    fit.observe(8, 8 * 500, 60.0)
    observe(fit, cost, 4, rng)
    check(fit, cost, 0.1)


def test_does_not_guess_from_passes_of_one_size() -> None:
    fit = CostFit()
    for _ in range(100):
        fit.observe(8, 8 * 500, 0.03)
    assert fit.fit() is None


@pytest.mark.parametrize("seed", range(5))
def test_short_texts_are_not_taken_for_what_long_ones_cost(seed: int) -> None:
    """Noise of texts of 50 to 64 tokens could be put down to pairs, and a text of 1,000 would look dear."""
    rng, cost, fit = random.Random(seed), PassCost(0.1, 2e-3), CostFit()
    for _ in range(60):
        prompt = rng.randrange(50, 64)
        for new, total in ((prompt, prompt), (1, prompt + 2), (4, prompt + 8)):
            fit.observe(new, new * total, cost.seconds(new, total) * rng.uniform(0.6, 2.5), total)
    found = fit.fit()
    assert found is not None
    assert found.seconds(512, 1024) < 3 * cost.seconds(512, 1024)


def test_passes_of_one_size_do_not_make_it_forget_the_others() -> None:
    rng, cost = random.Random(4), PassCost(0.02, 1e-3)
    fit = CostFit()
    observe(fit, cost, 60, rng)
    for _ in range(2000):
        fit.observe(16, 16 * 400, cost.seconds(16, 400) * rng.uniform(0.99, 1.01))
    check(fit, cost, 0.1)


def test_reading_the_cache_costs_beside_the_new_tokens() -> None:
    rng, cost, fit = random.Random(5), PassCost(0.03, 5e-4, 1e-7, 1e-5), CostFit()
    for _ in range(400):
        texts, new = rng.choice([(1, 1), (1, 64), (1, 256), (4, 1), (16, 1), (8, 4)])
        total = rng.randrange(300, 900)
        seconds = 0.03 + texts * (1e-5 * total + new * (5e-4 + 1e-7 * total))
        fit.observe(texts * new, texts * new * total, seconds * rng.uniform(0.97, 1.03), texts * total)
    found = fit.fit()
    assert found is not None
    assert found.per_cached_s == pytest.approx(cost.per_cached_s, rel=0.15)
    check(fit, cost, 0.1)


def test_says_how_far_off_it_was() -> None:
    rng, calm, wild = random.Random(3), CostFit(), CostFit()
    for _ in range(200):
        new = rng.choice(SIZES)
        calm.observe(new, new * 500, (0.02 + 1e-3 * new) * rng.uniform(0.99, 1.01))
        wild.observe(new, new * 500, (0.02 + 1e-3 * new) * rng.uniform(0.5, 1.5))
    calm_fit, wild_fit = calm.fit(), wild.fit()
    assert calm_fit is not None
    assert wild_fit is not None
    assert calm_fit.error < 0.03 < 0.1 < wild_fit.error


@given(st.lists(st.tuples(st.integers(1, 2048), st.integers(0, 8192), st.floats(1e-6, 100)), max_size=60))
def test_no_cost_is_ever_negative(passes: list[tuple[int, int, float]]) -> None:
    fit = CostFit()
    for new, before, seconds in passes:
        fit.observe(new, new * (before + new), seconds)
    found = fit.fit()
    if found is not None:
        assert min(found.fixed_s, found.per_token_s, found.per_pair_s, found.error) >= 0


@given(
    st.floats(0, 1),
    st.floats(1e-6, 0.1),
    st.floats(0, 1e-4),
    st.floats(0, 1e-4),
    st.integers(0, 8192),
    st.floats(0, 10),
)
def test_the_most_that_fits_into_a_time_does(
    fixed: float, per_token: float, per_pair: float, per_cached: float, cached: int, seconds: float
) -> None:
    cost = PassCost(fixed, per_token, per_pair, per_cached)
    most = cost.most_new(seconds, cached)
    assert most >= 0
    if most:
        assert cost.seconds(most, cached + most) <= seconds * (1 + 1e-6)
        assert cost.seconds(most + 2, cached + most + 2) > seconds


def test_a_pass_that_costs_nothing_has_room_for_everything() -> None:
    assert PassCost(0.0, 0.0).most_new(1.0, 100) == 1 << 30
    assert PassCost(0.5, 0.0).most_new(0.4, 100) == 0


def test_predicts_a_pass_over_several_texts() -> None:
    rng, cost = random.Random(5), PassCost(0.02, 1e-3, 1e-7)
    fit = CostFit()
    assert fit.predicted_s(8, 8 * 512) is None
    observe(fit, cost, 100, rng)
    # Two texts in one pass share the fixed part.
    both = cost.seconds(64, 1024) + cost.seconds(8, 512) - cost.fixed_s
    predicted = fit.predicted_s(64 + 8, 64 * 1024 + 8 * 512)
    assert predicted == pytest.approx(both, rel=0.1)
