"""The bounds against worked examples: Vicuna-7B in fp16 on an A6000, with an AGX-class device."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hat_runtime.control import limits
from hat_runtime.control.limits import LimitParts

VICUNA = LimitParts(
    hidden_bytes=8192,
    rate_up=5e6,
    rate_down=10e6,
    rtt=0.020,
    t_in=0.006,
    t_head=0.002,
    t_cloud=0.015,
    beta=0.1511e-3,
    s=0.08096e-3,
)
T_DRAFT = 0.008


def _link(mbytes_up: float, rtt_ms: float) -> LimitParts:
    return replace(
        VICUNA, rate_up=mbytes_up * 1e6, rate_down={5: 10e6, 10: 15e6}[int(mbytes_up)], rtt=rtt_ms / 1e3
    )


@pytest.mark.parametrize(
    ("acceptance", "rtt", "up", "loop", "sync", "drafts", "pipelined"),
    [
        (0.6, 20, 5, 45.5, 29.1, 2, 23.0),
        (0.6, 50, 5, 75.5, 44.1, 3, 35.0),
        (0.6, 100, 10, 124.4, 66.2, 4, 54.5),
        (0.7, 20, 10, 44.4, 25.3, 3, 18.9),
        (0.7, 50, 5, 75.5, 37.8, 4, 28.2),
        (0.7, 100, 5, 125.5, 55.6, 5, 43.2),
        (0.8, 50, 10, 74.4, 30.1, 5, 21.3),
        (0.8, 100, 10, 124.4, 42.8, 7, 31.3),
        (0.9, 50, 10, 74.4, 22.3, 9, 14.6),
    ],
)
def test_time_between_tokens(
    acceptance: float, rtt: float, up: float, loop: float, sync: float, drafts: int, pipelined: float
) -> None:
    parts = _link(up, rtt)
    assert limits.tbt_u_shape(parts) * 1e3 == pytest.approx(loop, abs=0.06)
    best, n = limits.best_synchronous(parts, acceptance, T_DRAFT)
    assert n == drafts
    assert best * 1e3 == pytest.approx(sync, abs=0.06)
    assert limits.tbt_pipelined(parts, acceptance, T_DRAFT) * 1e3 == pytest.approx(pipelined, abs=0.06)


@pytest.mark.parametrize(
    ("prompt", "up", "rtt", "limit", "unchunked", "best", "chunk"),
    [
        (512, 5, 20, 0.877, 0.981, 0.896, 96),
        (512, 10, 20, 0.457, 0.561, 0.477, 96),
        (2048, 5, 20, 3.393, 3.854, 3.435, 192),
        (2048, 10, 20, 1.715, 2.176, 1.757, 192),
        (2048, 10, 100, 1.795, 2.256, 1.837, 192),
        (4096, 10, 20, 3.393, 4.329, 3.453, 192),
    ],
)
def test_time_to_first_token(
    prompt: int, up: float, rtt: float, limit: float, unchunked: float, best: float, chunk: int
) -> None:
    parts = _link(up, rtt)
    assert limits.ttft_chunked_limit(parts, prompt) == pytest.approx(limit, abs=6e-4)
    assert limits.ttft_unchunked(parts, prompt) == pytest.approx(unchunked, abs=6e-4)
    assert limits.ttft_chunked(parts, prompt, chunk, chunk_cost=0.002) == pytest.approx(best, abs=6e-4)


def test_no_chunk_size_beats_the_limit_and_one_chunk_is_no_chunking() -> None:
    for prompt in (1, 7, 300, 4096):
        bound = limits.ttft_chunked_limit(VICUNA, prompt)
        assert all(
            limits.ttft_chunked(VICUNA, prompt, chunk) >= bound - 1e-9 for chunk in (1, 7, 64, 128, 4096)
        )
        assert limits.ttft_chunked(VICUNA, prompt, prompt) == pytest.approx(
            limits.ttft_unchunked(VICUNA, prompt)
        )


@pytest.mark.parametrize(("acceptance", "window"), [(0.0, 1), (0.6, 6), (0.7, 9), (0.8, 10), (1.0, 10)])
def test_window(acceptance: float, window: int) -> None:
    assert limits.pipeline_window(_link(5, 50), acceptance, T_DRAFT) == window


def test_certain_acceptance() -> None:
    assert limits.accepted_tokens(1.0, 4) == 5
    assert limits.accepted_tokens(0.0, 4) == 1
    assert limits.tbt_pipelined(VICUNA, 1.0, T_DRAFT) == T_DRAFT


def test_measured_prompts_stand_for_the_formulas_compute() -> None:
    """A straight line between two lengths; no prompt takes less than the shortest; longer ones in proportion."""
    measured = replace(
        VICUNA,
        cloud_prompts=((64, 0.040), (128, 0.060), (512, 0.200)),
        device_prompts=((64, 0.008), (512, 0.050)),
    )
    assert [measured.cloud_prompt(n) for n in (10, 64, 96, 1024)] == pytest.approx(
        [0.040, 0.040, 0.050, 0.400]
    )
    assert measured.device_prompt(288) == pytest.approx(0.029)
    assert VICUNA.cloud_prompt(64) == VICUNA.t_cloud
    assert VICUNA.device_prompt(288) == pytest.approx(288 * VICUNA.s)
    more = 0.050 - VICUNA.t_cloud + measured.device_prompt(96) - 96 * VICUNA.s
    grown = limits.ttft_unchunked(measured, 96) - limits.ttft_unchunked(VICUNA, 96)
    assert grown == pytest.approx(more)
    fast = replace(measured, rate_up=1e12)  # neither link nor device is slower than the cloud
    assert limits.ttft_chunked_limit(fast, 512) == pytest.approx(0.020 + 0.200 + fast.down + fast.t_head)
