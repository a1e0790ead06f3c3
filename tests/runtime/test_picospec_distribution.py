"""Above temperature 0 the exact samplers give the target's distribution, and the paper's top-K does not.

Everything takes part: the device's loop, the stream and the cloud's engine. Thousands of short answers, each with a
seed of its own, are compared with the exact distribution of whole texts, which a vocabulary of ten tokens allows to
enumerate.
"""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama import LlamaConfig

from hat_runtime.device.generator import GenerationRequest, GeneratorConfig
from hat_runtime.device.sampling import SamplingParams
from hat_runtime.device.token_answer import SpeculationConfig
from hat_runtime.model.sampling import probabilities
from hat_runtime.model.speculation import top_k
from tests.runtime.picospec_pair import perturbed, picospec

VOCABULARY, NEW = 10, 4
PROMPT = [1, 7, 3, 9]
PARAMS = SamplingParams(0.9)
AT_ONCE = 48
K = 2
"""Of top-K, where nearly everything is cut off."""


def tiny(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, initializer_range=0.35,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).float().eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("models") / "target", 1)


@pytest.fixture(scope="module")
def draft(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return perturbed(target, tmp_path_factory.mktemp("models") / "draft", 0.25)


@torch.inference_mode()
def tables(folder: Path) -> list[np.ndarray]:
    """For each position of the answer the distribution after every possible text: [10**i, 10]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out = []
    for length in range(NEW):
        texts = [[*PROMPT, *rest] for rest in itertools.product(range(VOCABULARY), repeat=length)]
        logits = model(torch.tensor(texts)).logits[:, -1].float()
        out.append(np.stack([probabilities(row, PARAMS) for row in logits]))
    return out


def joint(rows: list[np.ndarray]) -> np.ndarray:
    """Probability of every text, [10**NEW]."""
    whole = np.ones(1)
    for table in rows:
        whole = (whole[:, None] * table).ravel()
    return whole


def of_top_k(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """What the paper's rule gives instead of p: min(p, q) + beta * residual over the K likeliest."""
    inside = np.zeros_like(p)
    ids = top_k(p, K).ids
    inside[ids] = np.maximum(0, p - q)[ids]
    if not inside.any():
        inside[ids] = p[ids]
    return np.minimum(p, q) + np.maximum(0, p - q).sum() * inside / inside.sum()


def rho(p: np.ndarray, q: np.ndarray) -> float:
    """Total variation of `of_top_k` to p: sum over x outside of TopK(p) of max(0, p - q)."""
    return float(np.delete(np.maximum(0, p - q), top_k(p, K).ids).sum())


async def answers(
    target: Path, draft: Path, sampler: str, count: int, seed: int = 0
) -> tuple[np.ndarray, float]:
    """Shares of all texts among `count` answers, [10**NEW], and the share of accepted drafts."""
    seen = np.zeros(VOCABULARY**NEW)
    requests = []
    speculation = SpeculationConfig(max_draft=2, window=2, sampler=sampler, ahead=1, adaptive=False)
    config = GeneratorConfig(max_idle_conversations=AT_ONCE, min_reuse_tokens=3)
    seeds = iter(range(seed, seed + count))
    async with picospec(target, draft, speculation, config=config, max_sessions=2 * AT_ONCE, top_k=K) as (
        generator,
        _,
    ):

        async def some() -> None:
            for own in seeds:
                request = GenerationRequest(PROMPT, NEW, SamplingParams(PARAMS.temperature, seed=own))
                text = [event.token_id async for event in generator.generate(request)]
                seen[int("".join(map(str, text)))] += 1
                requests.append(request.stats)

        await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    accepted = sum(stats.accepted_tokens for stats in requests) / sum(
        stats.draft_tokens for stats in requests
    )
    return seen / count, accepted


def distance(one: np.ndarray, two: np.ndarray) -> float:
    """Total variation."""
    return float(np.abs(one - two).sum() / 2)


def marginals(whole: np.ndarray) -> list[np.ndarray]:
    """Distributions of pairs of neighbours: few cells, so little noise."""
    cube = whole.reshape((VOCABULARY,) * NEW)
    everything = set(range(NEW))
    return [cube.sum(axis=tuple(everything - {i, i + 1})).ravel() for i in range(NEW - 1)]


async def check_exact(target: Path, draft: Path, sampler: str, count: int, nearer: float) -> None:
    want = joint(tables(target))
    seen, accepted = await answers(target, draft, sampler, count)
    assert 0.1 < accepted < 0.95  # the rule was put to the test
    rng = np.random.default_rng(0)
    for have, right in zip(marginals(seen), marginals(want), strict=True):
        others = [distance(rng.dirichlet(np.ones(len(right))), right) for _ in range(20)]
        assert nearer * distance(have, right) < np.mean(others)


@pytest.mark.parametrize("sampler", ["coupled", "thinning"])
async def test_exact_samplers_give_the_targets_distribution(target: Path, draft: Path, sampler: str) -> None:
    await check_exact(target, draft, sampler, 2_000, 8)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("sampler", ["coupled", "thinning"])
async def test_exact_samplers_give_the_targets_distribution_long(
    target: Path, draft: Path, sampler: str
) -> None:
    await check_exact(target, draft, sampler, 100_000, 20)


async def test_top_k_misses_it_by_what_the_formula_says(target: Path, draft: Path) -> None:
    p, q = tables(target), tables(draft)
    # The first token is drawn in the cloud and exact; from the second on a draft is judged.
    lossy = [p[0]] + [
        np.stack([of_top_k(a, b) for a, b in zip(ps, qs, strict=True)])
        for ps, qs in zip(p[1:], q[1:], strict=True)
    ]
    for ps, qs, ls in zip(p[1:], q[1:], lossy[1:], strict=True):
        for a, b, c in zip(ps, qs, ls, strict=True):
            assert (
                distance(a, c) == pytest.approx(rho(a, b), abs=1e-9) or not (a - b)[top_k(a, K).ids].max() > 0
            )
    right, paper = marginals(joint(p)), marginals(joint(lossy))
    seen = marginals((await answers(target, draft, "topk", 3_000))[0])
    for have, exact, formula in zip(seen, right, paper, strict=True):
        gap = distance(exact, formula)
        assert gap > 0.1
        assert distance(have, formula) < 0.5 * gap  # it is where the formula says
        assert distance(have, exact) > 0.6 * gap  # and not at the target
