"""When drafting pays: properties of the rules."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hat_runtime.control.drafting import (
    BETTER,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    LONGEST_STAY,
    OFF_ABOVE,
    PRIOR,
    PROBE_ROUNDS,
    TRIAL_TOKENS,
    Calibration,
    Pace,
    RoundTimes,
    StopRule,
    Throttle,
    average,
    window_tokens,
    worth_sending_ahead,
)

chances = st.floats(0, 1)
seconds = st.floats(1e-6, 10)


@given(st.lists(seconds, min_size=1))
def test_an_average_lies_among_what_was_seen(seen: list[float]) -> None:
    value = 0.0
    for one in seen:
        value = average(value, one)
    assert min(seen) * (1 - 1e-9) <= value <= max(seen) * (1 + 1e-9)


class TestCalibration:
    @given(chances)
    def test_unseen_drafts_are_trusted_as_their_drafter_does(self, confidence: float) -> None:
        assert Calibration().rate("x", confidence) == pytest.approx(confidence)

    @given(chances, st.lists(st.booleans()))
    def test_a_rate_is_a_probability(self, confidence: float, seen: list[bool]) -> None:
        calibration = Calibration()
        for accepted in seen:
            calibration.observe("x", confidence, accepted)
        assert 0 <= calibration.rate("x", confidence) <= 1

    @given(chances, chances, st.lists(st.booleans()))
    def test_being_right_raises_it_and_being_wrong_lowers_it(
        self, confidence: float, other: float, seen: list[bool]
    ) -> None:
        right, wrong = Calibration(), Calibration()
        for accepted in seen:
            right.observe("x", confidence, accepted)
            wrong.observe("x", confidence, accepted)
        right.observe("x", confidence, True)
        wrong.observe("x", confidence, False)
        assert right.rate("x", confidence) > wrong.rate("x", confidence)
        assert right.rate("y", other) == pytest.approx(other)  # another drafter's are its own affair

    def test_the_past_fades(self) -> None:
        calibration = Calibration()
        for accepted in [True] * 500 + [False] * 500:
            calibration.observe("x", 0.9, accepted)
        # 50 observations are the most that count (1 / (1 - 0.98)), beside the prior.
        assert calibration.rate("x", 0.9) == pytest.approx(PRIOR * 0.9 / (50 + PRIOR), rel=0.01)

    @pytest.mark.parametrize("confidence", [0.0, 0.0999, 1.0])
    def test_the_ends_of_the_scale(self, confidence: float) -> None:
        calibration = Calibration()
        calibration.observe("x", confidence, True)
        assert calibration.rate("x", confidence) == pytest.approx((1 + PRIOR * confidence) / (1 + PRIOR))


class TestStopRule:
    @given(st.lists(chances, max_size=12), st.integers(1, 32), chances)
    def test_no_chain_is_longer_than_the_longest(self, drafts: list[float], most: int, worth: float) -> None:
        if len(drafts) >= most:
            assert StopRule(most).enough(drafts, drafts, worth)
            assert StopRule(most, 0.0).enough(drafts, drafts, worth)

    @given(st.integers(1, 32), chances, st.none() | chances)
    def test_one_draft_is_always_tried(self, most: int, worth: float, threshold: float | None) -> None:
        assert not StopRule(most, threshold).enough([], [], worth)

    @given(st.lists(chances, min_size=1, max_size=5), chances, chances)
    def test_a_threshold_looks_at_the_last_draft_only(
        self, drafts: list[float], threshold: float, worth: float
    ) -> None:
        found = StopRule(6, threshold).enough(drafts, [0.0] * len(drafts), worth)
        assert found == (drafts[-1] < threshold)

    @given(st.lists(chances, min_size=1, max_size=5), chances)
    def test_the_chain_goes_on_while_its_whole_is_likely_enough(
        self, drafts: list[float], worth: float
    ) -> None:
        assert StopRule(6).enough(drafts, drafts, worth) == (math.prod(drafts) < worth)

    @given(st.lists(chances, min_size=1, max_size=4), chances, chances)
    def test_what_was_enough_stays_enough(self, drafts: list[float], one_more: float, worth: float) -> None:
        rule = StopRule(6)
        if rule.enough(drafts, drafts, worth):
            longer = [*drafts, one_more]
            assert rule.enough(longer, longer, worth)


class TestRoundTimes:
    def test_before_anything_was_seen(self) -> None:
        times = RoundTimes()
        assert (times.token_s, times.plain_s, times.least_worth, times.steps_left(9.0)) == (0, 0, 0.2, 1)

    @given(seconds, st.integers(1, 7), st.floats(0, 20))
    def test_one_round(self, took: float, tokens: int, drafting: float) -> None:
        times = RoundTimes()
        times.saw_round(took, tokens, drafting)
        assert times.token_s == pytest.approx(took / tokens)
        assert times.plain_s == pytest.approx(max(0.0, took - drafting))

    @given(seconds, seconds, st.integers(1, 7))
    def test_the_least_worth_is_a_probability(self, draft: float, took: float, tokens: int) -> None:
        times = RoundTimes(draft_s=draft)
        times.saw_round(took, tokens, 0.0)
        assert times.least_worth == pytest.approx(min(1.0, draft * tokens / took))

    @given(seconds, seconds, st.floats(0, 20))
    def test_the_drafts_left_fit_into_the_time_left(self, wait: float, draft: float, elapsed: float) -> None:
        left = RoundTimes(draft_s=draft, wait_s=wait).steps_left(elapsed)
        assert left >= 0
        assert left * draft <= max(0.0, wait - elapsed) + 1e-9
        assert (left + 1) * draft > wait - elapsed - 1e-9


@given(chances, seconds, seconds)
def test_sending_ahead(chance: float, wait: float, compute: float) -> None:
    """Always where all is certain, never where nothing is; a likelier round is never held back sooner."""
    assert worth_sending_ahead(1.0, wait, compute)
    assert not worth_sending_ahead(0.0, wait, compute)
    if worth_sending_ahead(chance, wait, compute):
        assert worth_sending_ahead((1 + chance) / 2, wait, compute)


class TestWindow:
    @given(st.floats(0, 10), st.just(0.0) | seconds, chances)
    def test_at_least_one_draft(self, wait: float, interval: float, acceptance: float) -> None:
        assert window_tokens(wait, interval, acceptance) >= 1

    @given(seconds, seconds, st.floats(0.06, 0.99), st.floats(0.06, 0.99))
    def test_better_drafts_open_it(self, wait: float, interval: float, one: float, other: float) -> None:
        low, high = sorted((one, other))
        assert window_tokens(wait, interval, low) <= window_tokens(wait, interval, high)

    @pytest.mark.parametrize(
        ("wait", "interval", "acceptance", "window"),
        [
            (0.1, 0.01, 1.0, 10),  # as many as fill the wait
            (0.1, 0.01, 0.5, 5),  # ln .05 / ln .5 = 4.3: what lies further is wrong 19 times of 20
            (0.03, 0.01, 0.9, 3),
            (0.1, 0.01, 0.05, 1),
            (0.1, 0.01, 0.0, 1),
            (0.1, 0.0, 0.9, 1),  # nothing seen yet
        ],
    )
    def test_table(self, wait: float, interval: float, acceptance: float, window: int) -> None:
        assert window_tokens(wait, interval, acceptance) == window


def times(cost: float) -> RoundTimes:
    """A token takes `cost` times what it would without drafts."""
    return RoundTimes(round_s=2.0, tokens=2.0 / cost, saved_s=1.0)


def pause(throttle: Throttle, cost: float) -> int:
    """Rounds that drafting stays off after it has cost that much for long enough."""
    for _ in range(PROBE_ROUNDS):
        assert throttle.drafting
        throttle.after_round(times(cost))
    rounds = 0
    while not throttle.drafting:
        throttle.after_round(times(cost))
        rounds += 1
    return rounds


class TestThrottle:
    def test_drafting_that_pays_stays_on(self) -> None:
        assert pause(Throttle(), 0.9) == 0

    def test_each_failure_doubles_the_pause(self) -> None:
        throttle = Throttle()
        found = [pause(throttle, 1.5) for _ in range(8)]
        assert found == [min(LONGEST_PAUSE, FIRST_PAUSE * 2**n) for n in range(8)]

    def test_the_pause_is_forgotten_once_drafting_has_paid(self) -> None:
        throttle = Throttle()
        assert [pause(throttle, cost) for cost in (1.5, 1.5)] == [16, 32]
        assert pause(throttle, 0.9) == 0
        throttle.after_round(times(1.5))
        assert not throttle.drafting
        assert throttle._rounds_off == FIRST_PAUSE

    def test_between_the_two_nothing_changes(self) -> None:
        """Hysteresis: a hair above what it would cost without is no reason to stop, nor to forget the pause."""
        throttle = Throttle()
        assert pause(throttle, 1.5) == 16
        assert pause(throttle, (1 + OFF_ABOVE) / 2) == 0
        throttle.after_round(times(1.5))
        assert throttle._rounds_off == 2 * FIRST_PAUSE

    @given(st.lists(st.floats(0.1, 3), max_size=300))
    def test_it_always_tries_again(self, costs: list[float]) -> None:
        throttle = Throttle()
        for cost in costs:
            throttle.after_round(times(cost))
            assert 0 <= throttle._rounds_off <= LONGEST_PAUSE
        rounds = 0
        while not throttle.drafting:
            throttle.after_round(times(3.0))
            rounds += 1
        assert rounds <= LONGEST_PAUSE

    def test_no_verdict_without_a_measurement(self) -> None:
        throttle = Throttle()
        for _ in range(50):
            throttle.after_round(RoundTimes())
        assert throttle.drafting


class TestPace:
    """Drafting or not, by what both took."""

    @staticmethod
    def spend(pace: Pace, tokens: int, drafting_s: float, plain_s: float) -> int:
        """How many of the tokens came with drafting."""
        drafted = 0
        for _ in range(tokens):
            drafted += pace.drafting
            pace.saw(drafting_s if pace.drafting else plain_s)
        return drafted

    @given(seconds, seconds)
    def test_nearly_all_tokens_come_the_faster_way(self, drafting_s: float, plain_s: float) -> None:
        pace = Pace()
        drafted = self.spend(pace, 10_000, drafting_s, plain_s)
        if drafting_s < BETTER * plain_s:
            assert drafted > 9_000
        elif plain_s < BETTER * drafting_s:
            assert drafted < 1_000

    def test_it_follows_what_changes(self) -> None:
        pace = Pace()
        self.spend(pace, 5_000, 1.0, 2.0)
        self.spend(pace, LONGEST_STAY + TRIAL_TOKENS, 2.0, 1.0)
        assert self.spend(pace, 2_000, 2.0, 1.0) < 300

    def test_where_both_take_the_same_it_does_not_waver(self) -> None:
        pace = Pace()
        self.spend(pace, 200, 1.0, 1.0)
        assert self.spend(pace, 10_000, 1.0, 1.0) > 9_000


class TestOthers:
    def test_nothing_is_known_of_them_at_first(self) -> None:
        calibration = Calibration()
        rates = [calibration.rate_of_other("x", 0.5, rank) for rank in (1, 2, 3)]
        assert rates == sorted(rates, reverse=True)
        assert all(0 < rate < 0.5 for rate in rates)

    def test_each_rank_is_counted_where_the_draft_was_refused(self) -> None:
        calibration = Calibration()
        for _ in range(60):
            calibration.observe_others("x", 0.5, (7, 8, 9), 8)
        assert calibration.rate_of_other("x", 0.5, 2) > 0.8
        assert max(calibration.rate_of_other("x", 0.5, rank) for rank in (1, 3)) < 0.1
        assert calibration.rate_of_other("y", 0.5, 2) < 0.2
        assert calibration.rate("x", 0.5) == pytest.approx(0.5)
