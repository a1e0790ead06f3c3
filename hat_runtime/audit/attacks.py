"""What attackers of different knowledge do with what crossed the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hat_runtime.audit.linear import Probe
from hat_runtime.audit.matching import VocabularyMatcher
from hat_runtime.audit.subject import Crossed, Subject
from hat_runtime.wire.codec import RowCodec

KNOWLEDGE = ("embedding", "pairs", "weights", "head")
"""The embedding table; (token, state) pairs of a device of the fleet, no weights; all weights; final norm and head."""


@dataclass(frozen=True)
class Pairs:
    """What the owner of a device knows: the tokens of its own texts and the states that it sent, texts one by one."""

    ids: torch.Tensor
    """int64 [n]"""
    states: torch.Tensor
    """[n, hidden_size], before any codec."""
    first: torch.Tensor
    """bool [n]: first token of a text."""

    @classmethod
    def collect(cls, subject: Subject, texts: Iterator[Sequence[int]], most: int) -> Pairs:
        """Up to `most` pairs of texts, in their order; the last text is cut.

        Args:
            subject: the model.
            texts: token ids, none empty, at least one.
            most: pairs.
        """
        ids: list[int] = []
        states, first = [], []
        while len(ids) < most:
            text = list(next(texts))[: most - len(ids)]
            ids += text
            states.append(subject.states(text))
            first.append(torch.arange(len(text)) == 0)
        return cls(torch.tensor(ids), torch.cat(states), torch.cat(first))


def by_embedding(subject: Subject, seen: torch.Tensor) -> list[int]:
    """The token whose embedding has the nearest direction, of each shallow state [n, hidden_size].

    The attack of many a claim of privacy; what it misses is no measure of what states hide.
    """
    table = torch.nn.functional.normalize(subject.embed(torch.arange(subject.vocab_size)).float(), dim=-1)
    ids: list[int] = (seen.float() @ table.T).argmax(-1).tolist()
    return ids


class ByPairs:
    """A linear probe of the first `count` pairs, seen through a codec."""

    def __init__(self, subject: Subject, codec: RowCodec, pairs: Pairs, count: int) -> None:
        states = subject.through(codec, pairs.states[:count]).float()
        ids, first = pairs.ids[:count], pairs.first[:count]
        # The state of a text's first token resembles no other, so it gets a probe of its own.
        self._first = Probe.fit(ids[first], states[first])
        others = ~first if not bool(first.all()) else first
        self._others = Probe.fit(ids[others], states[others])

    def recover(self, seen: torch.Tensor) -> list[int]:
        """The likeliest token of each shallow state [n, hidden_size]."""
        rows = seen.float()
        ids: list[int] = torch.cat([self._first.guess(rows[:1]), self._others.guess(rows[1:])]).tolist()
        return ids


def by_head(subject: Subject, deep: torch.Tensor) -> list[int]:
    """The likeliest token of each deep state [n, hidden_size]: one product, no search."""
    ids: list[int] = subject.ends.head(deep).argmax(-1).tolist()
    return ids


def by_weights(matcher: VocabularyMatcher, crossed: Crossed) -> tuple[list[int], list[int]]:
    """(prompt, answer without its last token), from the shallow states of both."""
    ids = matcher.recover(crossed.shallow)
    return ids[: len(crossed.prompt)], ids[len(crossed.prompt) :]
