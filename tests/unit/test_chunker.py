"""The device's choice of chunk sizes: from what its link and the cloud have said."""

from __future__ import annotations

import pytest
import torch

from hat_runtime.control.chunk_policy import FALLBACK, Bounds, balance, predicted_ttft, predictive
from hat_runtime.control.pass_cost import PassCost
from hat_runtime.device.chunking import ChunkConfig, Chunker
from hat_runtime.device.link import CloudLink
from hat_runtime.device.steps import Binding
from hat_runtime.errors import UsageError
from hat_runtime.model.split import LayerRange
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb

SHALLOW = PassCost(0.003, 5e-5)


@pytest.fixture
async def link() -> CloudLink:
    return CloudLink("127.0.0.1:9")


def chunker(link: CloudLink, config: ChunkConfig | None = None) -> Chunker:
    binding = Binding("", LayerRange(3, 30), torch.bfloat16, 576)
    return Chunker(config or ChunkConfig(), link, binding)


def learn(link: CloudLink, rate: float = 1e6) -> None:
    """What a device has seen after a prompt."""
    link.estimate.rtt_s = 0.02
    link.estimate.uplink_bytes_per_s = rate
    link.cloud_cost = pb.CostHints(fixed_s=0.018, per_token_s=6e-4, per_pair_s=1e-7, prompt_rows=96)
    link.cloud_wait_s, link.company = 0.004, 3.2


async def test_a_fixed_size_is_fixed(link: CloudLink) -> None:
    learn(link)
    assert chunker(link, ChunkConfig(99)).size(0, 2000, SHALLOW) == 99
    assert chunker(link, ChunkConfig(0)).size(0, 2000, SHALLOW) == 0


async def test_what_is_not_known_is_not_guessed(link: CloudLink) -> None:
    one = chunker(link)
    assert one.size(0, 2000, SHALLOW) == FALLBACK
    assert one.predicted_s(0, 2000, 128, SHALLOW) is None
    one.saw_ttft(None, 1.0)
    learn(link)
    assert one.size(0, 2000, None) == FALLBACK
    assert one.predicted_s(0, 2000, 128, SHALLOW) == predicted_ttft(one.conditions(SHALLOW), 0, 2000, 128)


@pytest.mark.parametrize("rate", [2e5, 1e6, 1e7])
async def test_sizes_are_the_policys(link: CloudLink, rate: float) -> None:
    learn(link, rate)
    bounds = Bounds(32, 300)
    quick, papers = (
        chunker(link, ChunkConfig(None, "predictive", bounds)),
        chunker(link, ChunkConfig(None, "balance", bounds)),
    )
    now = quick.conditions(SHALLOW)
    assert (now.company, now.pass_tokens, now.wait_s, now.row_bytes) == (3, 96, 0.004, 1152)
    assert quick.size(10, 2000, SHALLOW) == predictive(now, 10, 2000, bounds)
    assert papers.size(10, 2000, SHALLOW) == balance(now, 2000, bounds)


@pytest.mark.parametrize("policy", ["predictive", "balance"])
async def test_what_the_cloud_proposes_is_a_start_until_more_is_known(link: CloudLink, policy: str) -> None:
    one = chunker(link, ChunkConfig(None, policy, Bounds(64, 512)))
    assert one.size(0, 2000, SHALLOW) == FALLBACK
    link.suggested_chunk = 300
    assert one.size(128, 2000, SHALLOW, first=False) == 300  # also in the middle of the first prompt
    link.suggested_chunk = 4000
    assert one.size(0, 2000, SHALLOW) == 512
    link.suggested_chunk = 0  # withdrawn
    assert one.size(0, 2000, SHALLOW) == 512
    learn(link, 3e6)
    own = chunker(link, ChunkConfig(None, policy, Bounds(64, 512))).size(0, 400, SHALLOW)
    link.suggested_chunk = 512 if own < 256 else 64
    assert one.size(0, 400, SHALLOW) == own  # what the device knows itself wins
    assert one.size(100, 400, SHALLOW, first=False) == own


async def test_a_change_of_the_link_changes_the_size(link: CloudLink) -> None:
    one = chunker(link, ChunkConfig(None, "balance"))
    sizes = []
    for rate in (5e5, 5e7, 5e5):
        learn(link, rate)
        sizes.append(one.size(0, 2000, SHALLOW))
    assert len(set(sizes)) > 1


async def test_in_the_middle_of_a_prompt_only_another_link_changes_it(link: CloudLink) -> None:
    one = chunker(link, ChunkConfig(None, "balance"))
    learn(link, 5e5)
    size = one.size(0, 2000, SHALLOW)
    learn(link, 6e5)
    assert one.size(500, 2000, SHALLOW, first=False) == size
    learn(link, 5e7)
    assert one.size(500, 2000, SHALLOW, first=False) > size


async def test_predictions_learn_what_they_leave_out(link: CloudLink) -> None:
    learn(link)
    one = chunker(link)
    bare = one.predicted_s(0, 1000, 128, SHALLOW)
    assert bare is not None
    for _ in range(20):
        one.saw_ttft(one.predicted_s(0, 1000, 128, SHALLOW), bare + 0.03)
    assert one.predicted_s(0, 1000, 128, SHALLOW) == pytest.approx(bare + 0.03, rel=0.01)
    for _ in range(20):  # a pause of the machine is no part of it
        one.saw_ttft(one.predicted_s(0, 1000, 128, SHALLOW), bare - 0.2)
    assert one.predicted_s(0, 1000, 128, SHALLOW) == pytest.approx(bare, rel=0.02)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="--chunk-tokens -1: must be auto or 0 or more"):
        ChunkConfig(-1)
    with pytest.raises(UsageError, match="--chunk-policy 'best': must be one of balance, predictive"):
        ChunkConfig(None, "best")
