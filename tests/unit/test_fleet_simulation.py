"""The simulated fleet: closed forms where there are some, and nothing is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hat_runtime.cloud.scheduler import SchedulerConfig
from hat_runtime.control.chunk_policy import Conditions, predicted_ttft
from hat_runtime.control.limits import LimitParts, tbt_u_shape, ttft_unchunked
from hat_runtime.control.pass_cost import PassCost
from hat_runtime.device.chunking import ChunkConfig
from hat_runtime.device.policy import DraftConfig
from tests.fleets import CLOUD, DEVICE, HIDDEN, LINK, ROW_BYTES, one_device

from fleet.costs import VICUNA_7B, MeasuredCloud  # isort: skip
from fleet.device import LinkRates, Way  # isort: skip
from fleet.guesses import Round  # isort: skip
from fleet.simulation import Outcome, PaperFleet  # isort: skip
from fleet.ways import FIXED, HAT, HAT_COURTEOUS, PAPER_WAYS, U_SHAPE  # isort: skip
from fleet.workload import SPEC_BENCH, Request  # isort: skip


def paper(way: Way, requests_s: float = 4.0, seed: int = 0, **changes: Any) -> Outcome:
    fleet = PaperFleet(VICUNA_7B, SPEC_BENCH, 12, 2, requests_s, answer_tokens=24, **changes)
    return fleet.run(way, warm_s=1.0, measured_s=8.0, tail_s=1.0, seed=seed)


@given(st.integers(1, 1900), st.sampled_from([64, 100, 200, 512, 0]), st.floats(3e5, 3e7), st.floats(0, 0.2))
@settings(max_examples=60, deadline=None)
def test_one_device_alone_sees_what_is_predicted(tokens: int, chunk: int, rate: float, rtt_s: float) -> None:
    cost = PassCost(0.012, 3e-4, 2e-8, 1e-6)
    shallow = PassCost(0.002, 4e-5)
    now = Conditions(
        row_bytes=ROW_BYTES,
        uplink_bytes_per_s=rate,
        rtt_s=rtt_s,
        shallow=shallow,
        cost=cost,
        downlink_bytes_per_s=9e6,
        head_s=DEVICE.head.seconds(1, 0) + shallow.seconds(1, tokens + 1),
        pass_tokens=4096,  # the prediction fills a pass only with what was there when the one before it began
    )
    outcome = one_device(
        Way("", ChunkConfig(chunk), SchedulerConfig(max_batch_tokens=4096)),
        Request(0.0, 0, tokens, 2),
        clouds=[MeasuredCloud(cost)],
        devices=[(replace(DEVICE, shallow=shallow), LinkRates(rate, 9e6, rtt_s))],
    )
    assert outcome.records[0].ttft_s == pytest.approx(predicted_ttft(now, 0, tokens, chunk or tokens))


@pytest.mark.parametrize("tokens", [10, 500, 1500])
def test_u_shape_alone_is_the_formula(tokens: int) -> None:
    parts = LimitParts(
        hidden_bytes=ROW_BYTES,
        rate_up=LINK.up_bytes_s,
        rate_down=LINK.down_bytes_s,
        rtt=LINK.rtt_s,
        t_in=DEVICE.shallow.per_token_s,
        t_head=DEVICE.head.fixed_s,
        t_cloud=CLOUD.weights_s,
        beta=CLOUD.row_s,
        s=DEVICE.shallow.per_token_s,
    )
    (record,) = one_device(U_SHAPE, Request(0.0, 0, tokens, 9)).records
    # A token comes when its own shallow state is computed as well, but for the last, which needs none.
    assert record.ttft_s == pytest.approx(ttft_unchunked(parts, tokens) + parts.t_in)
    expected = [tbt_u_shape(parts)] * 7 + [tbt_u_shape(parts) - parts.t_in]
    assert [gap for gap, _ in record.gaps] == pytest.approx(expected)


def test_recorded_rounds_take_the_sum_of_their_parts() -> None:
    rounds = (Round(4, 2), Round(1, 1), Round(3, 3), Round(2, 2))
    way = Way("", ChunkConfig(0), drafting=DraftConfig(window=1, branches=0, alternatives=0, adaptive=False))
    (record,) = one_device(way, Request(0.0, 0, 50, 9, rounds)).records
    drafts = [one.rows - 1 for one in rounds[1:]] + [None]
    expected = []
    for one, following in zip(rounds, drafts, strict=True):
        row_s = ROW_BYTES / LINK.up_bytes_s + ROW_BYTES / LINK.down_bytes_s
        took_s = one.rows * row_s + LINK.rtt_s + CLOUD.weights_s + DEVICE.head.fixed_s
        if following is not None:
            took_s += (following + 1) * DEVICE.shallow.seconds(1, 0) + following * DEVICE.draft_s
        expected.append((pytest.approx(took_s / one.tokens), one.tokens))
    assert record.gaps == expected
    assert record.tokens == 9


@pytest.mark.parametrize("way", PAPER_WAYS, ids=lambda way: way.name)
def test_every_request_ends_with_all_its_tokens(way: Way) -> None:
    outcome = paper(way)
    assert outcome.requests > 20
    assert (outcome.ended, outcome.tokens) == (outcome.requests, 24 * outcome.requests)
    assert (outcome.failed, outcome.evictions, outcome.overloaded) == (0, 0, False)
    assert all(1 + sum(tokens for _, tokens in one.gaps) == 24 for one in outcome.records)
    assert (outcome.tokens_a_round > 1.5) == (way.drafting is not None)


@pytest.mark.parametrize("window", [1, 4, None])
def test_rounds_that_leave_before_the_one_before_was_checked(window: int | None) -> None:
    way = replace(HAT, drafting=DraftConfig(window=window, alternatives=0))
    outcome = paper(way, 1.0, rtt_s=0.1)
    assert outcome.tokens == 24 * outcome.requests


def test_requests_end_where_pages_run_out() -> None:
    """Sessions lose their pages to older ones, and their devices send the text again."""
    model = replace(VICUNA_7B, kv_tokens=1600)
    fleet = PaperFleet(model, SPEC_BENCH, 12, 1, 3.0, answer_tokens=24)
    outcome = fleet.run(HAT, warm_s=0.0, measured_s=8.0, tail_s=0.0)
    assert outcome.evictions > 0
    assert outcome.ended == outcome.requests
    answered = outcome.requests - outcome.failed
    assert len(outcome.records) == answered > 0
    assert all(one.tokens == 24 for one in outcome.records)


def test_the_same_seed_gives_the_same_run() -> None:
    first, again, other = (paper(HAT_COURTEOUS, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@given(st.integers(20, 1500), st.sampled_from([64, 128, 0]), st.floats(3e5, 2e7), st.floats(1.0, 5.0))
@settings(max_examples=40, deadline=None)
def test_a_faster_link_is_hardly_ever_slower(tokens: int, chunk: int, rate: float, faster: float) -> None:
    """More chunks may be there when a pass ends, and make the next one longer: by one pass at most."""
    slow, fast = (
        one_device(Way("", ChunkConfig(chunk)), Request(0.0, 0, tokens, 2), LinkRates(up, 8e6, 0.02)).records[
            0
        ]
        for up in (rate, rate * faster)
    )
    assert fast.ttft_s <= slow.ttft_s + CLOUD.weights_s + 1e-9
    assert fast.tbt_s <= slow.tbt_s + 1e-9


def test_what_a_faster_link_and_more_load_do_to_a_fleet() -> None:
    calm, quick = paper(FIXED), paper(FIXED, uplink=(10e6, 20e6), downlink=(20e6, 30e6))
    assert quick.ttft.mean < 0.7 * calm.ttft.mean, "prompts are bound by the uplink"
    busy = paper(FIXED, 12.0)
    assert busy.busy > calm.busy
    assert busy.tbt.mean > calm.tbt.mean


@pytest.mark.parametrize(("fixed_s", "row_s", "chosen"), [(0.06, 1e-4, 192), (0.002, 5e-4, 64)])
def test_devices_learn_link_and_cloud_from_results_alone(fixed_s: float, row_s: float, chosen: int) -> None:
    """The first prompt goes up in chunks of the default size; later ones are predicted and cut by what was seen."""
    requests = [Request(10.0 * index, 0, 900, 4) for index in range(6)]
    cloud = MeasuredCloud(PassCost(fixed_s, row_s))
    records = simulate_all(
        Way("", ChunkConfig()), requests, LinkRates(4e6, 8e6, 0.02), clouds=[cloud]
    ).records
    assert (records[0].chunk_tokens, records[0].predicted_s) == (128, None)
    assert records[-1].chunk_tokens == chosen
    assert records[-1].predicted_s == pytest.approx(records[-1].ttft_s, rel=0.02)
    assert records[-1].ttft_s < 0.97 * records[0].ttft_s


def test_a_pod_that_cannot_keep_up_is_given_up() -> None:
    slow = replace(CLOUD, weights_s=5.0)
    requests = [Request(0.01 * index, 0, 20, 4) for index in range(900)]
    outcome = simulate_all(U_SHAPE, requests, LINK, clouds=[slow])
    assert outcome.overloaded
    assert outcome.ended < outcome.requests


def test_one_by_one_requests_do_not_meet() -> None:
    requests = [Request(0.0, 0, 200, 4)] * 3
    outcome = simulate_all(U_SHAPE, requests, LINK, one_by_one=True)
    assert len({round(one.ttft_s, 9) for one in outcome.records}) == 1
    assert [one.began_s for one in outcome.records] == sorted({one.began_s for one in outcome.records})


def simulate_all(way: Way, requests: list[Request], link: LinkRates, **changes: Any) -> Outcome:
    from fleet.simulation import simulate

    values = {"clouds": [CLOUD], "kv_tokens": 1 << 16, "devices": [(DEVICE, link)], "hidden_size": HIDDEN}
    return simulate(way, requests, **(values | changes))


def test_prompts_leave_time_to_others_where_they_are_told_to() -> None:
    """A long prompt beside a session that decodes: its tokens come more evenly with courtesy."""
    requests = [Request(0.0, 0, 30, 120), Request(1.0, 1, 1800, 2)]
    devices = [(DEVICE, LinkRates(5e7, 5e7, 0.01))] * 2
    worst = {}
    for way in (
        replace(FIXED, scheduler=SchedulerConfig()),
        replace(FIXED, scheduler=HAT_COURTEOUS.scheduler),
    ):
        outcome = simulate_all(way, requests, LINK, devices=devices)
        decoding = next(one for one in outcome.records if one.request.device == 0)
        worst[way.scheduler.courtesy is not None] = max(gap for gap, _ in decoding.gaps)
    assert worst[True] < worst[False]
