"""The cloud's load as its Steps have met it lately."""

from __future__ import annotations

import pytest

from hat_runtime.cloud.load import IDLE_S, Load


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
