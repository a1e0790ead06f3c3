"""The fit of a pass's cost."""

from __future__ import annotations

import random

import pytest

from hat_runtime.control.cost import LinearCost


def test_finds_the_line_behind_noisy_passes_and_follows_a_change() -> None:
    rng = random.Random(1)
    cost = LinearCost()
    for fixed, slope in ((0.02, 0.001), (0.04, 0.002)):
        for _ in range(400):
            tokens = rng.choice([1, 8, 64, 256])
            cost.observe(tokens, (fixed + slope * tokens) * rng.uniform(0.95, 1.05))
        found = cost.fit()
        assert found is not None
        assert found == (pytest.approx(fixed, rel=0.2), pytest.approx(slope, rel=0.1))


def test_does_not_guess_from_passes_of_one_size() -> None:
    cost = LinearCost()
    for _ in range(100):
        cost.observe(8, 0.03)
    assert cost.fit() is None
