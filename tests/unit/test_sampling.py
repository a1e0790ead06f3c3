from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from hat_runtime.device.sampling import SamplingParams, gumbel_noise, nucleus, sample
from hat_runtime.errors import UsageError
from hat_runtime.model.sampling import probabilities

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, 1.5, 0.2])


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("vary", ["position", "seed"])
def test_frequencies_are_the_softmax(temperature: float, vary: str) -> None:
    draws = 20_000
    counts = np.zeros(len(LOGITS))
    for i in range(draws):
        seed, position = (5, i) if vary == "position" else (i, 40)
        counts[sample(LOGITS, SamplingParams(temperature, seed=seed), position)] += 1
    expected = softmax(LOGITS.double().numpy() / temperature) * draws
    assert chi_square(counts, expected) < 24.32  # 99.9 % quantile, 7 degrees of freedom


def test_successive_positions_are_independent() -> None:
    draws = [sample(torch.zeros(4), SamplingParams(1.0, seed=9), position) for position in range(20_001)]
    pairs = np.zeros((4, 4))
    for first, second in pairwise(draws):
        pairs[first, second] += 1
    assert chi_square(pairs, np.full((4, 4), 20_000 / 16)) < 37.7  # 99.9 %, 15 degrees of freedom


def test_temperature_zero_is_greedy_and_takes_the_first_of_equals() -> None:
    assert sample(LOGITS, SamplingParams(), 3) == 0
    assert sample(torch.tensor([0.0, 4.0, 4.0]), SamplingParams(), 0) == 1


def test_tiny_temperature_is_greedy_too() -> None:
    assert {sample(LOGITS, SamplingParams(1e-6, seed=s), 1) for s in range(50)} == {0}


def test_order_of_calls_does_not_matter() -> None:
    params = SamplingParams(1.0, 0.9, seed=123)
    forwards = [sample(LOGITS, params, position) for position in range(64)]
    backwards = [sample(LOGITS, params, position) for position in reversed(range(64))]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) > 1


def test_noise_is_pinned() -> None:
    """Another machine, or a later version, must draw the same text from the same seed."""
    ids = np.array([0, 1, 2, 49151])
    got = [gumbel_noise(seed, position, ids).tolist() for seed, position in ((0, 0), (-1, 5), (2**63, 1000))]
    want = [
        [-0.08116903215863935, -0.2719792283174781, -0.26508964732465634, 0.7071566309584044],
        [0.8035018209223612, -0.7042595333535941, 0.7714556566777055, 2.025686861515559],
        [1.5096198081131127, 0.14678808862282391, 1.2939463739314159, 2.461655006923721],
    ]
    assert np.allclose(got, want, rtol=1e-12, atol=0)


def test_noise_is_finite_and_standard_gumbel() -> None:
    noise = gumbel_noise(7, 7, np.arange(1_000_000))
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - np.euler_gamma) < 0.005
    assert abs(noise.var() - np.pi**2 / 6) < 0.01


@pytest.mark.parametrize("size", [8, 5000])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.5, 0.9, 0.999, 1 - 1e-12])
@pytest.mark.parametrize("width", [0.5, 6.0])
def test_nucleus_is_the_smallest_set_with_enough_mass(size: int, top_p: float, width: float) -> None:
    scores = np.random.default_rng(1).normal(size=size) * width
    kept = nucleus(scores, top_p)
    p = softmax(scores)
    assert len(set(kept)) == len(kept)
    assert p[kept].sum() >= top_p - 1e-9
    assert p[kept][:-1].sum() < top_p + 1e-9
    dropped = np.setdiff1d(np.arange(size), kept)
    assert not len(dropped) or p[kept].min() >= p[dropped].max()


def test_nucleus_of_equals_takes_low_ids_first() -> None:
    assert nucleus(np.zeros(1000), 0.01).tolist() == list(range(10))
    assert nucleus(np.array([0.0, 1.0, 1.0, 0.0]), 0.5).tolist() == [1, 2]


def test_top_p_restricts_the_text() -> None:
    params = [SamplingParams(1.0, 0.6, seed=s) for s in range(500)]
    drawn = {sample(LOGITS, p, 0) for p in params}
    assert drawn == set(nucleus(LOGITS.double().numpy(), 0.6).tolist())


@pytest.mark.parametrize(
    "field", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_wrong_values_are_refused_by_name(field: dict[str, float]) -> None:
    name, value = next(iter(field.items()))
    with pytest.raises(UsageError, match=f"{name} is {value}"):
        SamplingParams(**field)


@pytest.mark.parametrize("top_p", [1.0, 0.9, 5e-324])
@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-200, 1e-30])
def test_the_coldest_temperatures_are_greedy(temperature: float, top_p: float) -> None:
    logits = torch.tensor([1e30, -3e38, 3e38, 2.9e38, 0.0])
    params = SamplingParams(temperature, top_p, 5)
    assert [sample(logits, params, position) for position in range(20)] == [2] * 20
    assert probabilities(logits, params).tolist() == [0.0, 0.0, 1.0, 0.0, 0.0]
