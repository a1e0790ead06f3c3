"""A small language model drafts (Leviathan et al., arXiv 2211.17192): any folder with the same vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hat_runtime.device.chain import common_prefix
from hat_runtime.device.drafting.base import Draft, Drafter, DraftState, Wish
from hat_runtime.device.drafting.choose import choose
from hat_runtime.errors import ModelError
from hat_runtime.model.attention import make_backend
from hat_runtime.model.hf import context_length, load_decoder_slice, load_device_ends, num_layers
from hat_runtime.model.pages import OutOfPages, PagedSequence
from hat_runtime.model.runner import LayerRunner, Segment, make_cache
from hat_runtime.model.split import LayerRange


class ModelState(DraftState):
    """One conversation: the tokens that the model holds, and what it says of the next one."""

    def __init__(self) -> None:
        self.sequence = PagedSequence()
        self.held: list[int] = []
        self.logits: torch.Tensor | None = None
        """float32 [vocabulary] behind the last of them."""


class ModelDrafter(Drafter):
    """A whole small model."""

    name = "model"

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, vocab_size: int, *, kv_tokens: int
    ) -> None:
        """Load all of a model folder.

        Raises:
            ModelError: it cannot be used, or has another vocabulary.
        """
        super().__init__()
        self._ends = load_device_ends(folder, dtype, device)
        if self._ends.vocab_size != vocab_size:
            raise ModelError(
                f"the draft model {folder} has {self._ends.vocab_size} tokens, but the model has {vocab_size}: "
                "a draft model must share the model's tokenizer"
            )
        layers = load_decoder_slice(folder, LayerRange(0, num_layers(folder)), dtype, device)
        self._cache = make_cache(layers, num_pages=-(-kv_tokens // 16) + 8, page_tokens=16)
        self._runner = LayerRunner(layers, self._cache, make_backend("sdpa"))
        self._context = context_length(folder)
        self._ids = np.arange(vocab_size, dtype=np.int64)

    @property
    def context_length(self) -> int:
        """Most tokens of a text that it can continue."""
        return self._context

    def open(self) -> ModelState:
        """See Drafter."""
        return ModelState()

    def propose(self, wishes: Sequence[Wish]) -> list[Draft | None]:
        """See Drafter. No draft beyond the small model's context."""
        states = [wish.state for wish in wishes]
        fitting = [index for index, wish in enumerate(wishes) if len(wish.tokens) < self._context]
        self._run([(states[index], wishes[index].tokens) for index in fitting])  # type: ignore[misc]
        drafts: list[Draft | None] = [None] * len(wishes)
        for index in fitting:
            state, wish = states[index], wishes[index]
            assert isinstance(state, ModelState)
            if state.logits is not None:
                drafts[index] = choose(
                    state.logits,
                    self._ids,
                    wish.params,
                    len(wish.tokens),
                    self.name,
                    with_proposal=wish.with_proposal,
                    others=wish.others,
                )
        return drafts

    def prepare(self, state: DraftState, tokens: Sequence[int]) -> None:
        """See Drafter."""
        assert isinstance(state, ModelState)
        if len(tokens) < self._context:
            self._run([(state, tokens)])

    def release(self, state: DraftState) -> None:
        """See Drafter."""
        assert isinstance(state, ModelState)
        self._cache.release(state.sequence)
        state.held.clear()
        state.logits = None

    @torch.inference_mode()
    def _run(self, texts: Sequence[tuple[ModelState, Sequence[int]]]) -> None:
        """Bring every state to its text."""
        segments, running = [], []
        for state, tokens in texts:
            same = common_prefix(tokens, state.held)
            if same == len(tokens) == len(state.held) and state.logits is not None:
                continue
            same = min(same, len(tokens) - 1)
            new = list(tokens[same:])
            segments.append(Segment(state.sequence, same, self._ends.embed(torch.tensor(new))))
            running.append((state, list(tokens)))
        if not segments:
            return
        try:
            outputs = self._runner.run(segments)
        except OutOfPages:
            for state, _ in running:
                self.release(state)
            return
        logits = self._ends.head(torch.cat([output[-1:] for output in outputs])).cpu()
        for (state, tokens), row in zip(running, logits, strict=True):
            state.held, state.logits = tokens, row
