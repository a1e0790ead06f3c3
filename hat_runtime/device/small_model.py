"""The whole small model that a device may have, asked for one token after another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from hat_runtime.device.drafting.base import Wish
from hat_runtime.device.drafting.small_model import ModelDrafter
from hat_runtime.device.jobs import DeviceFull
from hat_runtime.device.submodels import DeviceModel
from hat_runtime.device.token_drafting import DraftModel
from hat_runtime.model.pages import PagedSequence
from hat_runtime.model.sampling import SamplingParams

PREFILL_TOKENS = 512
"""Tokens of a prompt in one pass: others' tokens wait no longer than for one."""


class SmallText(ABC):
    """One text that a small model continues. For the event loop's thread; `close` it."""

    @abstractmethod
    async def next_token(self, tokens: Sequence[int], params: SamplingParams) -> int:
        """The token behind a text, by the small model's own distribution.

        Args:
            tokens: the whole text so far; it has grown since the last call.
            params: how the token is chosen. The same seed gives the same text.

        Raises:
            DeviceFull: too few KV pages.
        """

    @abstractmethod
    def close(self) -> None:
        """Give its pages back."""


class SmallModel(ABC):
    """Begins texts."""

    context_length: int
    """Most tokens of a text."""

    @abstractmethod
    def open(self) -> SmallText:
        """A new text."""


def small_model_of(model: DeviceModel) -> SmallModel | None:
    """That of a device, however it drafts with it; None where it has none."""
    if isinstance(model, DraftModel):
        return _Draft(model)
    return _Drafting(model, model.drafter) if isinstance(model.drafter, ModelDrafter) else None


class _Draft(SmallModel):
    """Token mode's draft model."""

    def __init__(self, model: DraftModel) -> None:
        self._model = model
        self.context_length = model.context_length

    def open(self) -> SmallText:
        """See SmallModel."""
        return _DraftText(self._model)


class _DraftText(SmallText):
    def __init__(self, model: DraftModel) -> None:
        self._model = model
        self._sequence = PagedSequence()
        self._held = 0

    async def next_token(self, tokens: Sequence[int], params: SamplingParams) -> int:
        """See SmallText."""
        draft = None
        while self._held < len(tokens):
            new = tokens[self._held : self._held + PREFILL_TOKENS]
            last = self._held + len(new) == len(tokens)
            draft = await self._model.draft(self._sequence, new, self._held, params, proposes=last)
            self._held += len(new)
        assert draft is not None  # the text has grown
        return draft.token

    def close(self) -> None:
        """See SmallText."""
        self._model.release(self._sequence)


class _Drafting(SmallModel):
    """The drafter `model:FOLDER`, which lives in the device model's thread."""

    def __init__(self, model: DeviceModel, drafter: ModelDrafter) -> None:
        self._model, self._drafter = model, drafter
        self.context_length = drafter.context_length

    def open(self) -> SmallText:
        """See SmallModel."""
        return _DraftingText(self._model, self._drafter)


class _DraftingText(SmallText):
    def __init__(self, model: DeviceModel, drafter: ModelDrafter) -> None:
        self._model, self._drafter = model, drafter
        self._state = drafter.open()

    async def next_token(self, tokens: Sequence[int], params: SamplingParams) -> int:
        """See SmallText."""
        found: list[int] = []

        def propose() -> None:
            (draft,) = self._drafter.propose([Wish(self._state, tokens, params, with_proposal=False)])
            found.extend([] if draft is None else [draft.token])

        await self._model.call(propose)
        if not found:
            raise DeviceFull(f"the small model's KV cache has no room for a text of {len(tokens)} tokens")
        return found[0]

    def close(self) -> None:
        """See SmallText."""
        self._model.release(PagedSequence(), self._state)
