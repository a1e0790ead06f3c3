"""What a device's worker is asked to do for one session."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch

from hat_runtime.device.chain import Alternative, DraftPlan, Speculation, common_prefix
from hat_runtime.device.drafting.base import Draft, DraftState, Wish
from hat_runtime.device.verify import REJECTION, Verdict, judge
from hat_runtime.errors import HatError
from hat_runtime.model.pages import PagedSequence


class DeviceFull(HatError):
    """The device's KV pages cannot hold the session; others must end first."""


class Job(ABC):
    """Tokens of one session for the input layers, and what comes of them."""

    def __init__(self, sequence: PagedSequence, future: asyncio.Future[Any]) -> None:
        self.sequence = sequence
        self.future = future
        self.ids: list[int] = []
        """What the input layers run next; none: the job has what it needs."""
        self.start = 0
        """Position of the first of them."""
        self.aside: list[int] = []
        """Other choices for that position, which the input layers run along; the cache does not keep them."""
        self.wants_draft = False
        """After the input layers the drafter is to be asked."""
        self.draft_from = 0.0
        """time.perf_counter() when the drafter was asked first; 0: not yet."""
        self.delivered = False

    @abstractmethod
    def embedded(self, hidden: torch.Tensor) -> None:
        """Take the shallow states [len(ids) + len(aside), hidden_size]."""

    @abstractmethod
    def result(self) -> Any:
        """What the job's future gets."""


class ShallowJob(Job):
    """Known tokens: a prompt's chunk, or what an eviction has taken. Its result are their shallow states."""

    def __init__(
        self,
        sequence: PagedSequence,
        future: asyncio.Future[torch.Tensor],
        ids: list[int],
        start: int,
        state: DraftState | None,
    ) -> None:
        super().__init__(sequence, future)
        self.ids, self.start = ids, start
        self._state = state
        self._hidden = torch.empty(0)

    def embedded(self, hidden: torch.Tensor) -> None:
        """See Job."""
        self._hidden = hidden
        if self._state is not None:
            self._state.forget(self.start)  # an earlier text, or drafts
            self._state.note(self.start, hidden, None)

    def result(self) -> torch.Tensor:
        """[n, hidden_size]"""
        return self._hidden


@dataclass(frozen=True)
class Turn:
    """What a judged Step, or a moment of drafting, gave."""

    tokens: list[int]
    """Certain now, in order."""
    refused: bool = False
    """One of them replaces a draft: what was sent behind it is void."""
    alternative: bool = False
    """It was one of the draft's alternatives, so that the token behind it is known as well."""
    fresh: bool = False
    """The last of them was not among the drafts: the chain has begun anew behind it."""
    judged: tuple[tuple[Draft, bool], ...] = ()
    """Drafts with what the target said of them."""
    dropped: int = 0
    """Drafts that went with a refused one, itself included."""
    aside: int = 0
    """Alternatives that were checked."""
    hit: bool = False
    """The token behind the chain was one of the branches."""
    starved: bool = False
    """There was no room in the KV cache for the last token: it has no shallow state yet."""
    draft_s: float = 0.0
    """Seconds spent on drafts."""
    drafts: int = 0
    """How many were made."""


class TurnJob(Job):
    """Judge deep states, if any; then draft."""

    def __init__(
        self,
        speculation: Speculation,
        future: asyncio.Future[Turn],
        deep: torch.Tensor | None,
        plan: DraftPlan,
        *,
        alternatives: tuple[tuple[int, int], ...] = (),
        most: int = 1,
        go_on: bool = True,
        branch: int | None = None,
        told: asyncio.Future[list[int]] | None = None,
    ) -> None:
        """Describe the job.

        Args:
            speculation: the answer's chain.
            future: for the Turn.
            deep: deep states [n, hidden_size] of the last certain token and of the first n - 1 drafts, then of the
                alternatives; None: nothing is judged, the chain only grows.
            plan: how far to draft.
            alternatives: (position, token) of the last rows of `deep`.
            most: tokens that the text may still grow by.
            go_on: draft behind a chain that holds as well; False: only behind a fresh token.
            branch: draft what may follow if this token, and not the chain's, comes behind the last draft.
            told: gets the certain tokens as soon as they are known, before there are drafts.
        """
        super().__init__(speculation.sequence, future)
        self.told = told
        self.deep = deep
        self._spec = speculation
        self._plan = plan
        self._most = most
        self._go_on = go_on
        self._branch = branch
        self._alternatives = alternatives
        self._grown: list[Draft] = []
        self._turn = Turn([])
        self._starved = False
        if deep is None:
            self._extend()

    def judge(self, logits: torch.Tensor, normed: torch.Tensor) -> None:
        """Check the chain's drafts; logits float32 [rows, vocabulary] and normed deep states [rows, hidden_size]."""
        spec = self._spec
        drafts, chain = list(spec.drafts), len(logits) - len(self._alternatives)
        verdict = self._verdict(logits[:chain], drafts, [])
        accepted, tokens, rows = verdict.accepted, verdict.tokens, [verdict.accepted]
        judged = [(draft, True) for draft in drafts[:accepted]]
        if verdict.refused:
            judged.append((drafts[accepted], False))
        right = (len(spec.tokens) + accepted, tokens[-1])
        alternative = verdict.refused and not self._complete(tokens) and right in self._alternatives
        if alternative:
            row = chain + self._alternatives.index(right)
            tokens = tokens + self._verdict(logits[row : row + 1], [], tokens).tokens
            rows.append(row)
        last = tokens[-1]
        fresh = len(tokens) > accepted
        ended = self._complete(tokens)
        spec.confirm(accepted, normed)
        if fresh:
            spec.state.forget(len(spec.tokens))  # what it was told of the drafts that were refused
        hit, dropped = False, len(drafts) - accepted if fresh or ended else 0
        if fresh:
            replaced = verdict.refused and not alternative
            branch = spec.branches.get(last) if replaced and spec.point == 0 else None
            spec.restart()
            spec.tokens += tokens[accepted:]
            spec.fresh = normed[rows]
            if branch is not None:
                hit = True
                spec.drafts = list(branch)
        elif ended:
            spec.restart()
        self._turn = Turn(
            tokens,
            verdict.refused,
            alternative,
            fresh,
            tuple(judged),
            dropped,
            len(self._alternatives),
            hit,
        )
        # Where the text ends, nobody needs the last token's states.
        if not ended and (fresh or (self._go_on and not self._enough())):
            self._extend()

    @property
    def tokens(self) -> list[int]:
        """What is certain by the deep states, once they were judged."""
        return self._turn.tokens

    def _verdict(self, logits: torch.Tensor, drafts: list[Draft], before: list[int]) -> Verdict:
        """What the target says of drafts, or of the token, behind the certain ones and those `before`."""
        spec = self._spec
        return judge(
            logits,
            drafts,
            spec.params,
            len(spec.tokens) + len(before),
            sampler=spec.sampler,
            stop_ids=spec.stop_ids,
            most=self._most - len(before),
        )

    def _complete(self, tokens: list[int]) -> bool:
        """Whether the text ends with these new tokens."""
        return len(tokens) >= self._most or tokens[-1] in self._spec.stop_ids

    def embedded(self, hidden: torch.Tensor) -> None:
        """See Job."""
        spec, first, tokens = self._spec, self.start, self.ids
        if self.aside:
            hidden, others = hidden[: len(tokens)], hidden[len(tokens) :]
            spec.alternatives[first] = [
                Alternative(token, others[index : index + 1]) for index, token in enumerate(self.aside)
            ]
        self.ids, self.aside = [], []
        certain = max(0, len(spec.tokens) - first)
        if certain:
            new = 1 if spec.fresh is None else len(spec.fresh)
            lacking, hidden = hidden[certain - new : certain], hidden[certain:]
            spec.cached, spec.held, spec.hidden[:1] = len(spec.tokens), [], [lacking]
            if spec.fresh is not None:
                spec.noted.append((len(spec.tokens) - new, lacking, spec.fresh))
                spec.tell_drafter()
                spec.fresh = None
            first, tokens = len(spec.tokens), tokens[certain:]
        behind = first - len(spec.tokens)
        spec.held[behind:] = tokens
        if self._branch is None:
            spec.hidden[behind + 1 :] = [hidden[index : index + 1] for index in range(len(hidden))]
        for index in range(len(hidden)):
            spec.state.note_draft(first + index, hidden[index : index + 1])
        self.wants_draft = not self._enough()

    def wish(self) -> Wish:
        """What the drafter is asked."""
        spec = self._spec
        return Wish(spec.state, self._text(), spec.params, self._rejecting, self._plan.others)

    @property
    def _rejecting(self) -> bool:
        return self._spec.sampler == REJECTION and self._spec.params.temperature > 0

    def drafted(self, draft: Draft) -> bool:
        """Take a draft; whether another pass follows."""
        spec = self._spec
        self._grown.append(draft)
        self.wants_draft = False
        if self._branch is not None:
            self.start = len(spec.tokens) + spec.point + len(self._grown)
            if self._enough():
                return False  # a branch's last draft is run when the branch is taken
        else:
            spec.drafts.append(draft)
            self.start = spec.end - 1
            if not self._rejecting:  # which judges one candidate for each position
                self.aside = list(draft.others[: self._plan.alternatives(spec.drafts)])
        self.ids = [draft.token]
        return True

    def no_room(self) -> None:
        """There is no room in the KV cache: do without drafts."""
        spec = self._spec
        if self._branch is None:
            del spec.drafts[max(0, len(spec.hidden) - 1) :]
        self.ids, self.aside = [], []
        self._starved = spec.cached < len(spec.tokens)

    def result(self) -> Turn:
        """See Job."""
        if self._branch is not None and self._turn.tokens == []:
            self._spec.branches[self._branch] = list(self._grown)
            self._spec.state.forget(len(self._spec.tokens) + self._spec.point)
        took = time.perf_counter() - self.draft_from if self.draft_from else 0.0
        return replace(self._turn, starved=self._starved, draft_s=took, drafts=len(self._grown))

    def _text(self) -> list[int]:
        spec = self._spec
        if self._branch is None:
            return spec.text
        drafts = [draft.token for draft in spec.drafts[: spec.point]]
        return [*spec.tokens, *drafts, self._branch, *(draft.token for draft in self._grown)]

    def _all(self) -> list[Draft]:
        return self._spec.drafts if self._branch is None else self._grown

    def _enough(self) -> bool:
        """Whether to draft no further."""
        spec = self._spec
        end = spec.end if self._branch is None else len(spec.tokens) + spec.point + 1 + len(self._grown)
        # What is judged with the last draft is one token more: with it the text is complete.
        return end + 1 >= spec.end_at or self._plan.enough(self._all())

    def _extend(self) -> None:
        """Run what the cache lacks of the chain, or of the branch's first token and what is before it; then draft."""
        spec = self._spec
        drafts = spec.drafts if self._branch is None else spec.drafts[: spec.point]
        wanted = [draft.token for draft in drafts]
        if self._branch is not None:
            wanted.append(self._branch)
        if spec.cached < len(spec.tokens):
            self.start, self.ids = spec.cached, [*spec.tokens[spec.cached :], *wanted]
            return
        same = common_prefix(wanted, spec.held)
        self.start, self.ids = len(spec.tokens) + same, wanted[same:]
        del spec.held[same:]
        if not self.ids:
            self.wants_draft = not self._enough()
