"""What a device remembers of its answers."""

from __future__ import annotations

from hat_runtime.device.recent import RecentAnswers
from hat_runtime.device.request import GenerationStats


def test_numbers_only_grow_and_the_oldest_are_forgotten() -> None:
    recent = RecentAnswers(kept=3)
    every = [GenerationStats(prompt_tokens=size) for size in range(5)]
    for stats in every:
        recent.began(stats)
        recent.ended(stats)
    assert recent.count == 5
    assert [(answer.number, answer.stats.prompt_tokens) for answer in recent.after()] == [
        (3, 2),
        (4, 3),
        (5, 4),
    ]
    assert [answer.number for answer in recent.after(4)] == [5]
    assert recent.after(5) == recent.after(99) == []


def test_an_answer_under_way_is_the_latest_until_it_has_ended() -> None:
    recent = RecentAnswers()
    assert recent.latest() is None
    assert recent.tokens_a_round() is None
    first, second = GenerationStats(), GenerationStats()  # equal, but not the same
    recent.began(first)
    recent.began(second)
    recent.ended(first)
    assert [stats is second for stats in recent.running] == [True]
    assert recent.latest() is second
    second.completion_tokens, second.rounds = 6, 4
    assert recent.tokens_a_round() == 1.5
    recent.ended(second)
    assert recent.running == []
    assert recent.latest() is second
