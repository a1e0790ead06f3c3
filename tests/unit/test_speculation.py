"""The rules of separate rejection sampling against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hat_runtime.model.sampling import SamplingParams, probabilities, sample, stream_seed, uniform
from hat_runtime.model.speculation import (
    Weighted,
    accepts,
    draws,
    residual_of_top_k,
    thin,
    top_k,
    top_k_bound,
)

RNG = np.random.default_rng(4)
P, Q = RNG.dirichlet(np.full(12, 0.5)), RNG.dirichlet(np.full(12, 0.5))
RESIDUAL = np.maximum(0, P - Q) / np.maximum(0, P - Q).sum()
MANY = 20_000


def shares(tokens: list[int]) -> np.ndarray:
    return np.bincount(tokens, minlength=12) / len(tokens)


def test_uniform_is_uniform_and_its_streams_are_independent() -> None:
    one = np.array([uniform(stream_seed(7, 2), i) for i in range(MANY)])
    two = np.array([uniform(stream_seed(7, 3), i) for i in range(MANY)])
    assert 0 < one.min() < one.max() < 1
    assert np.histogram(one, 10, (0, 1))[0] == pytest.approx(MANY / 10, rel=0.1)
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.03
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.03


def test_probabilities_are_what_sample_draws_from() -> None:
    logits = torch.tensor(np.log(P), dtype=torch.float32)
    for params in (SamplingParams(1.0), SamplingParams(0.7, 0.8)):
        p = probabilities(logits, params)
        drawn = [sample(logits, params, position) for position in range(MANY)]
        assert p.sum() == pytest.approx(1)
        assert np.abs(shares(drawn) - p).max() < 0.015
        assert set(drawn) <= set(np.flatnonzero(p))


@pytest.mark.parametrize("token", [0, 5, 11])
def test_a_draft_stands_with_probability_min_1_p_over_q(token: int) -> None:
    stood = np.mean([accepts(P[token], Q[token], 3, position) for position in range(MANY)])
    assert stood == pytest.approx(min(1, P[token] / Q[token]), abs=0.015)


def test_the_first_draw_that_survives_is_of_the_residual_distribution() -> None:
    got: list[int] = []
    failed = 0
    for position in range(MANY):
        attempt = 0
        while (token := thin(draws(P, 9, position, attempt, 2), Q, 9, position, attempt)) is None:
            attempt += 1
            failed += 1
        got.append(token)
    assert failed > 0
    assert np.abs(shares(got) - RESIDUAL).max() < 0.015


def test_top_k_draws_from_the_residual_over_the_likeliest() -> None:
    offered = top_k(P, 4)
    assert offered.ids == list(np.argsort(-P)[:4])
    assert top_k_bound(offered.probabilities) == pytest.approx(1 - np.sort(P)[-4:].sum())
    drawn = [residual_of_top_k(offered, Q, 5, position) for position in range(MANY)]
    inside = np.zeros(12)
    inside[offered.ids] = np.maximum(0, P - Q)[offered.ids]
    assert np.abs(shares(drawn) - inside / inside.sum()).max() < 0.015
    # Nothing of P is left over there: any choice is a guess, but one is made.
    assert residual_of_top_k(Weighted([3], [0.1]), np.full(12, 0.5), 5, 0) == 3
