"""The cloud's load as its Steps have met it lately."""

from __future__ import annotations

import pytest

from hat_runtime.cloud.load import IDLE_S, MOST_STEPS, Load


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_follows_the_steps_and_ends_with_them() -> None:
    clock = Clock()
    load = Load(clock)
    assert load.figures() == {"wait_s": 0.0, "company_tokens": 0.0}
    load.observe(0.004, 3)
    assert load.figures() == {"wait_s": 0.004, "company_tokens": 3.0}
    for _ in range(100):
        clock.now += IDLE_S
        load.observe(0.02, 16)
    assert load.figures() == {
        "wait_s": pytest.approx(0.02, rel=0.01),
        "company_tokens": pytest.approx(16, rel=0.01),
    }
    load.observe(None, 16)
    assert load.figures()["wait_s"] == pytest.approx(0.02, rel=0.01)
    clock.now += IDLE_S + 0.1
    assert load.figures() == {"wait_s": 0.0, "company_tokens": 0.0}
    load.observe(0.001, 0)  # what was before the pause says nothing about now
    assert load.figures() == {"wait_s": 0.001, "company_tokens": 0.0}
    clock.now += IDLE_S + 0.1
    load.observe(None, 2)
    assert load.figures() == {"wait_s": 0.0, "company_tokens": 2.0}


def test_slow_steps_are_the_slowest_twentieth_of_the_latest() -> None:
    clock = Clock()
    load = Load(clock)
    assert (load.slow_step_s(), load.stretch(), load.rows) == (0.0, 1.0, 1.0)
    for number in range(100):
        load.saw_step(3, 0.2 if number % 10 == 0 else 0.05, 0.04)
    assert (load.slow_step_s(), load.stretch(), load.rows) == (0.2, pytest.approx(5), pytest.approx(3))
    clock.now += IDLE_S / 2
    for _ in range(MOST_STEPS):
        load.saw_step(3, 0.05, 0.04)
    assert (load.slow_step_s(), load.stretch()) == (0.05, pytest.approx(1.25))
    clock.now += IDLE_S + 0.1
    assert (load.slow_step_s(), load.stretch()) == (0.0, 1.0)
    load.saw_step(7, 0.1, 0.0)  # before there is a model
    assert (load.slow_step_s(), load.stretch(), load.rows) == (0.1, 1.0, 7.0)
