"""Vocabulary matching: the attacker with the weights reads a text token by token.

"Hidden No More" (arXiv 2505.18332), SipIt (arXiv 2510.15511): with the prefix known, run each candidate for the next
token through the layers and keep the one whose state is the one seen. A linear model proposes a few candidates, so that
the whole vocabulary is run only where none of them fits.
"""

from __future__ import annotations

import torch

from hat_runtime.audit.linear import StateModel
from hat_runtime.audit.subject import Subject
from hat_runtime.model.pages import PagedSequence
from hat_runtime.model.runner import Segment
from hat_runtime.wire.codec import RowCodec

SHORTLIST = 16
FITS = 0.25
"""A candidate fits if it is at most this share of the next best one's distance away: the right one is off by rounding
alone, however coarse the codec, for the attacker encodes candidates too."""
BLOCK = 512
"""Candidates in one pass; each of them also costs a row of keys to every other."""
TRAINING_TEXT = 256


class StateModels:
    """The attacker's linear models: of a text's first token, whose state no other resembles, and of all others.

    Fitted on states of random token ids, which whoever has the weights can make as many of as wanted.
    """

    def __init__(self, subject: Subject, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._subject = subject
        self._embeddings = subject.embed(torch.arange(subject.vocab_size)).float()
        texts = -(-max(4096, 8 * subject.hidden_size) // TRAINING_TEXT)
        ids = torch.randint(subject.vocab_size, (texts, TRAINING_TEXT), generator=generator)
        self._ids = ids[:, 1:].reshape(-1)
        self._states = torch.cat([subject.states(text.tolist())[1:] for text in ids])
        self._first_ids = torch.randint(
            subject.vocab_size, (max(1024, 4 * subject.hidden_size),), generator=generator
        )
        start = PagedSequence()
        blocks = [candidates(subject, start, None, 0, part) for part in torch.split(self._first_ids, BLOCK)]
        subject.shallow.cache.release(start)
        self._first_states = torch.cat(blocks)

    def fit(self, codec: RowCodec) -> tuple[StateModel, StateModel]:
        """(of the first token, of all others), for states that come through a codec."""
        first, others = (
            StateModel.fit(self._embeddings, ids, self._subject.through(codec, states).float())
            for ids, states in ((self._first_ids, self._first_states), (self._ids, self._states))
        )
        return first, others


class VocabularyMatcher:
    """Reads texts from shallow states that came through one codec."""

    def __init__(
        self,
        subject: Subject,
        codec: RowCodec,
        models: tuple[StateModel, StateModel] | None,
        shortlist: int = SHORTLIST,
    ) -> None:
        """Without linear models the whole vocabulary is run for each token."""
        self._subject = subject
        self._codec = codec
        self._models = models
        self._shortlist = shortlist
        self.searches = 0
        """Tokens for which the whole vocabulary was run."""

    def recover(self, seen: torch.Tensor) -> list[int]:
        """The token ids of a text whose shallow states [n, hidden_size] were seen."""
        sequence = PagedSequence()
        ids: list[int] = []
        likely = None if self._models is None else self._likely(seen)
        lost = False
        try:
            for position, state in enumerate(seen):
                if likely is None:
                    best, _ = self._search(sequence, ids, state)
                else:
                    best, fits = self._nearest(sequence, ids, likely[position], state)
                    # A search in vain means that the prefix is wrong already: all that follow would be in vain too.
                    if not fits and not lost:
                        best, fits = self._search(sequence, ids, state)
                        lost = not fits
                ids.append(best)
        finally:
            self._subject.shallow.cache.release(sequence)
        return ids

    def _likely(self, seen: torch.Tensor) -> torch.Tensor:
        assert self._models is not None
        first, others = self._models
        parts = [
            model.ranked(rows.float(), self._shortlist)
            for model, rows in ((first, seen[:1]), (others, seen[1:]))
        ]
        return torch.cat(parts)

    def _search(self, sequence: PagedSequence, prefix: list[int], state: torch.Tensor) -> tuple[int, bool]:
        """The nearest token of all, and whether it fits."""
        self.searches += 1
        finalists = []
        for block in torch.split(torch.arange(self._subject.vocab_size), BLOCK):
            distances = self._distances(sequence, prefix, block, state)
            finalists.append(block[distances.topk(min(2, len(block)), largest=False).indices])
        return self._nearest(sequence, prefix, torch.cat(finalists), state)

    def _nearest(
        self, sequence: PagedSequence, prefix: list[int], tokens: torch.Tensor, state: torch.Tensor
    ) -> tuple[int, bool]:
        distances = self._distances(sequence, prefix, tokens, state)
        nearest = distances.topk(min(2, len(tokens)), largest=False)
        fits = len(tokens) == 1 or bool(nearest.values[0] <= FITS * nearest.values[1])
        return int(tokens[nearest.indices[0]]), fits

    def _distances(
        self, sequence: PagedSequence, prefix: list[int], tokens: torch.Tensor, state: torch.Tensor
    ) -> torch.Tensor:
        """Euclidean distances [n] of candidates int64 [n] behind a prefix from a state [hidden_size]."""
        pending = prefix[-1] if len(prefix) > sequence.length else None
        states = candidates(self._subject, sequence, pending, len(prefix), tokens)
        seen = self._subject.through(self._codec, states)
        distances: torch.Tensor = (seen.float() - state.float()).norm(dim=-1)
        return distances


def candidates(
    subject: Subject, sequence: PagedSequence, pending: int | None, position: int, tokens: torch.Tensor
) -> torch.Tensor:
    """Shallow states [n, hidden_size] that each of `tokens` int64 [n] would have at `position`.

    They are alternatives in the sense of the runner: none sees another, and the cache keeps none.

    Args:
        subject: the model.
        sequence: holds the text before `position`, or all but its last token.
        pending: that last token, which the sequence then holds; None if it does already.
        position: of all candidates.
        tokens: any number.
    """
    head = [] if pending is None else [pending]
    hidden = subject.embed(torch.cat([torch.tensor(head, dtype=torch.int64), tokens]))
    segment = Segment(sequence, position - len(head), hidden, aside=(position,) * len(tokens))
    (states,) = subject.shallow.run([segment])
    return states[len(head) :]
