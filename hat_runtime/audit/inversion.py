"""The inversion audit: every attack on every codec, over the same prompts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from hat_runtime.audit.attacks import ByPairs, Pairs, by_embedding, by_head, by_weights
from hat_runtime.audit.matching import StateModels, VocabularyMatcher
from hat_runtime.audit.subject import Crossed, Subject
from hat_runtime.model.sampling import SamplingParams
from hat_runtime.wire.codec import codec_named

RANDOM_TEXT = 256
"""Tokens of a text of random ids, where the attacker's own texts are not enough."""

Prompt = tuple[Sequence[int], slice]
"""Token ids, and which of them are the user's."""
Recover = Callable[[Crossed], tuple[list[int], list[int]]]
"""What crossed -> (guessed, true) tokens."""


@dataclass(frozen=True)
class InversionOptions:
    """What is tried."""

    codecs: Sequence[str]
    """Names of codec.CODECS."""
    knowledge: Sequence[str]
    """Of attacks.KNOWLEDGE."""
    pair_counts: Sequence[int] = (1000, 10_000)
    answer_tokens: int = 16
    temperature: float = 1.0
    """Of the answers that are not greedy."""
    seed: int = 0


@dataclass
class Figure:
    """One attack on one codec."""

    knowledge: str
    detail: str
    """What the attacker reads, and what from."""
    codec: str
    tokens: int = 0
    recovered: int = 0
    texts: int = 0
    exact: int = 0
    """Texts of which every token was recovered."""
    seconds: float = 0.0

    @property
    def share(self) -> float:
        """Of the tokens, 0 to 1."""
        return self.recovered / self.tokens

    def count(self, guess: Sequence[int], truth: Sequence[int]) -> None:
        """Compare one text with what the attacker makes of it."""
        assert len(guess) == len(truth) > 0
        right = sum(a == b for a, b in zip(guess, truth, strict=True))
        self.tokens += len(truth)
        self.recovered += right
        self.texts += 1
        self.exact += right == len(truth)


@dataclass
class Inversion:
    """The audit of one model and split."""

    subject: Subject
    options: InversionOptions
    prompts: Sequence[Prompt]
    pair_texts: Sequence[Sequence[int]] = ()
    """Texts of the attacker's own device; random ids follow where they are too short."""
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    figures: list[Figure] = field(default_factory=list)

    def run(self) -> list[Figure]:
        """All attacks, codec by codec."""
        wanted = set(self.options.knowledge)
        models = StateModels(self.subject, self.options.seed) if "weights" in wanted else None
        pairs = (
            Pairs.collect(self.subject, self._pair_texts(), max(self.options.pair_counts))
            if "pairs" in wanted
            else None
        )
        for done, name in enumerate(self.options.codecs):
            self.progress("codecs audited", done, len(self.options.codecs))
            self._audit(name, models, pairs)
        self.progress("codecs audited", len(self.options.codecs), len(self.options.codecs))
        return self.figures

    def _audit(self, name: str, models: StateModels | None, pairs: Pairs | None) -> None:
        options, subject, codec = self.options, self.subject, codec_named(name)
        greedy, sampled = (
            subject.answer(
                self.prompts, codec, options.answer_tokens, SamplingParams(temperature, seed=options.seed)
            )
            for temperature in (0.0, options.temperature)
        )
        for knowledge in options.knowledge:
            if knowledge == "embedding":
                self._try(knowledge, "prompt, nearest embedding", name, sampled, self._by_embedding)
            elif knowledge == "pairs":
                assert pairs is not None
                for count in options.pair_counts:
                    probe = ByPairs(subject, codec, pairs, count)
                    recover = _of_prompt(probe.recover)
                    self._try(knowledge, f"prompt, linear probe of {count:,} pairs", name, sampled, recover)
            elif knowledge == "weights":
                assert models is not None
                matcher = VocabularyMatcher(subject, codec, models.fit(codec))
                self._match(matcher, name, sampled)
            elif knowledge == "head":
                kind = f"sampled at temperature {options.temperature:g}"
                for answers, how in ((greedy, "greedy"), (sampled, kind)):
                    detail = f"answer, {how}, likeliest token of each deep state"
                    self._try(knowledge, detail, name, answers, self._by_head)

    def _match(self, matcher: VocabularyMatcher, name: str, crossed: Sequence[Crossed]) -> None:
        prompt, answer = (
            Figure("weights", f"{what}, vocabulary matching", name)
            for what in ("prompt", f"answer, sampled at temperature {self.options.temperature:g}")
        )
        for one in crossed:
            began = time.perf_counter()
            of_prompt, of_answer = by_weights(matcher, one)
            each = (time.perf_counter() - began) / (len(of_prompt) + len(of_answer))
            for figure, guess, truth in (
                (prompt, of_prompt[one.secret], one.prompt[one.secret]),
                (answer, of_answer, one.answer[:-1]),
            ):
                if truth:
                    figure.count(guess, truth)
                    figure.seconds += each * len(truth)
        self.figures += [figure for figure in (prompt, answer) if figure.texts]

    def _try(
        self, knowledge: str, detail: str, name: str, crossed: Sequence[Crossed], recover: Recover
    ) -> None:
        figure = Figure(knowledge, detail, name)
        for one in crossed:
            began = time.perf_counter()
            guess, truth = recover(one)
            figure.seconds += time.perf_counter() - began
            figure.count(guess, truth)
        self.figures.append(figure)

    def _by_embedding(self, crossed: Crossed) -> tuple[list[int], list[int]]:
        guess = by_embedding(self.subject, crossed.shallow[crossed.secret])
        return guess, list(crossed.prompt[crossed.secret])

    def _by_head(self, crossed: Crossed) -> tuple[list[int], list[int]]:
        return by_head(self.subject, crossed.deep), list(crossed.answer)

    def _pair_texts(self) -> Iterator[Sequence[int]]:
        generator = torch.Generator().manual_seed(self.options.seed + 1)
        random_texts = (
            torch.randint(self.subject.vocab_size, (RANDOM_TEXT,), generator=generator).tolist()
            for _ in itertools.count()
        )
        return itertools.chain(self.pair_texts, random_texts)


def _of_prompt(recover: Callable[[torch.Tensor], list[int]]) -> Recover:
    def run(crossed: Crossed) -> tuple[list[int], list[int]]:
        ids = recover(crossed.shallow[: len(crossed.prompt)])
        return ids[crossed.secret], list(crossed.prompt[crossed.secret])

    return run
