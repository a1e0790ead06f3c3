"""The text of sampled decoding is distributed as the target's, whatever drafts (Leviathan et al., arXiv 2211.17192).

As vLLM tests its rejection sampler (tests/v1/sample/test_rejection_sampler.py): with more draws, the empirical
distribution must come nearer to the target's many times faster than to random ones. Unlike there, a draw is a whole
answer, through the generation loop with a real drafter, and the distribution is the joint one of its first tokens.

The loop is that of `tests/lockstep.py`: real but for gRPC and the cloud's scheduler.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig

from hat_runtime.device import verify
from hat_runtime.device.generator import GenerationRequest
from hat_runtime.device.policy import DraftConfig
from hat_runtime.device.sampling import SamplingParams
from tests.lockstep import lockstep
from tests.tiny_drafters import INPUT_LAYERS, perturbed, train_tiny_drafters

VOCABULARY = 10
LOOKED_AT = 4
"""Leading tokens whose joint distribution is compared."""
NEW = 5
"""Tokens of an answer: there are drafts beyond those that are looked at."""
PROMPT = [token for y in range(VOCABULARY) for token in (9, y, (3 * y + 1) % VOCABULARY)] + [9]
"""Whatever comes next, the n-gram drafter has seen it behind a 9, and then what came behind that."""
SESSIONS = 64
FEW, MANY = 800, 100_000
REFERENCES = 100
NEARER = 20.0
"""How many times faster the target must be approached than random distributions, with 10 to 100,000 draws (vLLM)."""
IMPROBABLE = 1e-5
"""A sampler that is right fails the chi-square test of a case this often."""

EVERY = tuple(range(LOOKED_AT))
PAIRS = tuple((index, index + 1) for index in range(LOOKED_AT - 1))

Distribution = NDArray[np.float64]
"""Joint probabilities of the first tokens: [VOCABULARY] * LOOKED_AT."""


@pytest.fixture(scope="module")
def tiny_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama over ten tokens, neither sure nor uniform."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=INPUT_LAYERS + 1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=None,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("models") / "words"
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def drafters(tiny_words: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What --drafter is given, by kind."""
    folder = tmp_path_factory.mktemp("drafters")
    rng = np.random.default_rng(4)
    prompts = [PROMPT, *(rng.integers(0, VOCABULARY, 24).tolist() for _ in range(15))]
    trained = train_tiny_drafters(
        tiny_words, folder, ("adapter", "feature"), 10, prompts=prompts, draft_ids=range(VOCABULARY - 1)
    )
    files = {kind: next(trained.glob(f"*-{kind}.safetensors")) for kind in ("adapter", "feature")}
    return {
        "ngram": "ngram",
        "adapter": f"adapter:{files['adapter']}",
        "feature": f"feature:{files['feature']}",
        "hybrid": f"hybrid:{files['feature']}",
        "model": f"model:{perturbed(tiny_words, folder / 'perturbed', 0.06)}",
    }


@pytest.fixture(scope="module")
def exact(tiny_words: Path) -> Callable[[SamplingParams], Distribution]:
    """The whole model's own distribution: all continuations of the prompt, by transformers."""
    whole = AutoModelForCausalLM.from_pretrained(tiny_words, dtype=torch.float32).eval()
    words = torch.cartesian_prod(*[torch.arange(VOCABULARY)] * (LOOKED_AT - 1))
    with torch.inference_mode():
        texts = torch.cat([torch.tensor(PROMPT).expand(len(words), -1), words], 1)
        logits = whole(texts).logits[:, len(PROMPT) - 1 :].double()

    def distribution(params: SamplingParams) -> Distribution:
        p = torch.softmax(logits / params.temperature, -1)
        ordered, order = p.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= params.top_p] = 0  # the others reach top_p without it
        p = torch.zeros_like(p).scatter(-1, order, ordered)
        p /= p.sum(-1, keepdim=True)
        joint = torch.ones(())
        for index in range(LOOKED_AT):
            step = p[:, index].view(*[VOCABULARY] * LOOKED_AT)
            first = (slice(None),) * index + (0,) * (LOOKED_AT - 1 - index)
            joint = joint[..., None] * step[first]
        return joint.numpy()

    return distribution


@dataclass(frozen=True)
class Case:
    """Who drafts, and how."""

    drafter: str
    window: int | None
    branches: int
    sampler: str = verify.REJECTION
    top_p: float = 1.0
    adaptive: bool = False
    """With the rules that look at the clock, as a device has them by default."""

    @property
    def config(self) -> DraftConfig:
        """For the generator."""
        return DraftConfig(
            2 if self.branches == 1 else 1,  # what follows a branch is among the tokens that are looked at
            None if self.adaptive else 0.0,
            self.window,
            self.branches,
            2,  # coupled only
            self.sampler,
            self.adaptive,
        )

    @property
    def params(self) -> SamplingParams:
        """Without a seed."""
        return SamplingParams(1.0, self.top_p)

    def __str__(self) -> str:
        window = "auto" if self.window is None else self.window
        words = [self.drafter, f"window-{window}", f"branches-{self.branches}", self.sampler]
        words += [f"top_p-{self.top_p}"] * (self.top_p < 1) + ["adaptive"] * self.adaptive
        return "-".join(words)


async def draw(folder: Path, drafter: str, case: Case, count: int) -> tuple[NDArray[np.int64], Counter[str]]:
    """The first tokens [count, LOOKED_AT] of answers with seeds of their own, and what was seen on the way."""
    texts = np.zeros((count, LOOKED_AT), np.int64)
    seeds = iter(range(count))
    async with lockstep(
        folder, INPUT_LAYERS, drafter, case.config, sessions=SESSIONS, patient=not case.adaptive
    ) as (generator, seen):

        async def answer_seeds() -> None:
            for seed in seeds:
                request = GenerationRequest(PROMPT, NEW, sampling=replace(case.params, seed=seed))
                text = [event.token_id async for event in generator.generate(request)]
                assert len(text) == NEW
                texts[seed] = text[:LOOKED_AT]

        await asyncio.gather(*(answer_seeds() for _ in range(SESSIONS)))
    return texts, seen


def approach(texts: NDArray[np.int64], target: Distribution, few: int = 10) -> float:
    """How many times faster draws approach the target than random distributions, from `few` draws to all.

    vLLM's measure: distances are L2; that to the references is the mean over random ones of the same shape. The least
    over the pairs of neighbouring tokens.
    """
    references = np.random.default_rng(0).random((REFERENCES, VOCABULARY**2))
    references /= references.sum(1, keepdims=True)

    def distances(look: tuple[int, ...], count: int) -> tuple[float, float]:
        seen = histogram(texts[:count, look]).reshape(-1) / count
        near = np.linalg.norm(marginal(target, look) - seen)
        return float(near), float(np.linalg.norm(references - seen, axis=1).mean())

    found = []
    for look in PAIRS:
        (near_few, away_few), (near_many, away_many) = distances(look, few), distances(look, len(texts))
        found.append((near_few / near_many) / (away_few / away_many))
    return min(found)


def marginal(target: Distribution, look: tuple[int, ...]) -> NDArray[np.float64]:
    """Of the tokens `look`, flat."""
    return target.sum(axis=tuple(set(EVERY) - set(look))).reshape(-1)


def histogram(texts: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each text was drawn: [VOCABULARY] * tokens."""
    shape = (VOCABULARY,) * texts.shape[1]
    return np.bincount(
        np.ravel_multi_index(tuple(texts.T), shape), minlength=VOCABULARY ** len(shape)
    ).reshape(shape)


def improbability(texts: NDArray[np.int64], target: Distribution) -> float:
    """Least p-value of Pearson's chi-square tests: all tokens looked at together, and each pair of neighbours."""
    return min(
        chi_square(histogram(texts[:, look]).reshape(-1), marginal(target, look) * len(texts))
        for look in (EVERY, *PAIRS)
    )


def chi_square(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    """p-value; what is expected fewer than 5 times is taken together."""
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    seen = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    return float(
        torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2).double(), torch.tensor(statistic / 2))
    )


PAIRWISE = (  # every drafter in every window; any two other settings meet in one case at least
    Case("ngram", 1, 3, top_p=0.8),
    Case("ngram", 2, 1),
    Case("ngram", None, 3, verify.COUPLED, adaptive=True),
    Case("adapter", 1, 3),
    Case("adapter", 2, 1, verify.COUPLED, top_p=0.8),
    Case("adapter", None, 3, top_p=0.8, adaptive=True),
    Case("feature", 1, 3, adaptive=True),
    Case("feature", 2, 3, verify.COUPLED),
    Case("feature", None, 1, top_p=0.8),
    Case("hybrid", 1, 3),
    Case("hybrid", 2, 1, top_p=0.8, adaptive=True),
    Case("hybrid", None, 3),
    Case("model", 1, 3),
    Case("model", 2, 3, top_p=0.8, adaptive=True),
    Case("model", None, 1),
)
EVERY_DRAFTER = (
    Case("ngram", 2, 1),
    Case("adapter", None, 3),
    Case("feature", 2, 3, top_p=0.8),
    Case("hybrid", 1, 3),
    Case("model", 1, 3),
    Case("model", None, 1, verify.COUPLED),
    Case("hybrid", 1, 3, verify.COUPLED),
)
GRID = tuple(
    Case(drafter, window, branches, sampler, top_p)
    for drafter in ("ngram", "adapter", "feature", "hybrid", "model")
    for window in (1, 2, None)
    for branches in (1, 3)
    for sampler, top_p in ((verify.REJECTION, 1.0), (verify.REJECTION, 0.8), (verify.COUPLED, 1.0))
)


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
async def test_texts_are_distributed_as_the_targets(
    tiny_words: Path, drafters: dict[str, str], exact: Any, case: Case
) -> None:
    """From 10 to 100,000 draws the distance falls by 100, to FEW by less, and as much less is asked of it."""
    texts, seen = await draw(tiny_words, drafters[case.drafter], case, FEW)
    report(case, texts, exact(case.params), seen)
    assert improbability(texts, exact(case.params)) > IMPROBABLE
    assert approach(texts, exact(case.params)) > NEARER * (FEW / MANY) ** 0.5
    check_cover(case, seen)


def check_cover(case: Case, seen: Counter[str]) -> None:
    """The draws went through what they are to test."""
    if case.adaptive:
        return  # drafting may have been switched off, or there was no time for it
    for source in {"hybrid": ("ngram", "feature")}.get(case.drafter, (case.drafter,)):
        assert seen[f"{source} accepted"]
        assert seen[f"{source} refused"]
    assert seen["drafted ahead"]
    assert seen["bonus"] or seen["all accepted"]
    if case.branches > 1 and case.window == 1 and case.drafter != "ngram" and case.sampler != verify.COUPLED:
        assert seen["branch hit"]
    assert bool(seen["alternative"]) == (case.sampler == verify.COUPLED and case.drafter != "ngram")


def report(case: Case, texts: NDArray[np.int64], target: Distribution, seen: Counter[str]) -> None:
    """For `pytest -s`."""
    found = f"{approach(texts, target):6.1f} x, p = {improbability(texts, target):.2g}"
    print(f"\n{case!s:60} {len(texts):6} draws {found}  {dict(seen)}", flush=True)


def accept_always(logits: torch.Tensor, draft: Any, params: SamplingParams, position: int) -> int:
    """Wrong: the text is the drafter's."""
    return draft.token if draft else RIGHT(logits, draft, params, position)


def replace_by_target(ids: Any, p: Any, proposal: Any) -> Any:
    """Wrong: what replaces a refused draft is drawn from p, not from what p has more of than q."""
    return p


RIGHT = verify._accept_or_replace
WRONG = {
    "accept_always": ("_accept_or_replace", accept_always),
    "replace_by_target": ("residual", replace_by_target),
}


@pytest.mark.parametrize("rule", WRONG)
@pytest.mark.parametrize("case", [Case("ngram", 2, 1), Case("model", 1, 3)], ids=str)
async def test_a_wrong_sampler_is_found(
    tiny_words: Path,
    drafters: dict[str, str],
    exact: Any,
    case: Case,
    rule: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With as many draws as the test above has."""
    monkeypatch.setattr(verify, *WRONG[rule])
    texts, seen = await draw(tiny_words, drafters[case.drafter], case, FEW)
    report(case, texts, exact(case.params), seen)
    assert improbability(texts, exact(case.params)) < IMPROBABLE


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("case", GRID if os.environ.get("HAT_FULL_GRID") else EVERY_DRAFTER, ids=str)
async def test_with_many_draws(tiny_words: Path, drafters: dict[str, str], exact: Any, case: Case) -> None:
    """`make full-distribution`: 100,000 answers of every case, some 10 minutes each on one core."""
    texts, seen = await draw(tiny_words, drafters[case.drafter], case, MANY)
    report(case, texts, exact(case.params), seen)
    assert approach(texts, exact(case.params)) > NEARER
    assert improbability(texts, exact(case.params)) > IMPROBABLE
    check_cover(case, seen)
