"""Drafters that are trained for the model and the split: `adapter` and `feature` (model/drafter.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hat_runtime.device.drafting.base import Draft, Drafter, DraftState, Wish
from hat_runtime.device.drafting.choose import choose
from hat_runtime.model.attention import AttentionBatch, make_backend
from hat_runtime.model.drafter import DrafterNet, check_fit, load_drafter, read_info, rotate, rotation
from hat_runtime.model.hf import DeviceEnds
from hat_runtime.model.packed import can_pack, pack_linears, packed_linear
from hat_runtime.model.pages import KvCache, OutOfPages, PagedSequence
from hat_runtime.model.runner import LayerRunner, Segment

PASS_ROWS = 512
"""Rows of one conversation in a pass: a long prompt is taken in by several."""


class NetworkState(DraftState):
    """One conversation: rows that the network has in its KV cache, and rows that wait for it."""

    def __init__(self, net: DrafterNet) -> None:
        self._net = net
        self.sequence = PagedSequence()
        self.offset = 0
        """Position of the first row in the cache: what was before it was never seen."""
        self.waiting: list[torch.Tensor] = []
        """The layer's input rows, not run yet, [n, hidden_size] each; they follow what is in the cache."""
        self.guesses: dict[int, torch.Tensor] = {}
        """By position, the network's output [1, hidden_size] for the last rows of its passes."""

    @property
    def end(self) -> int:
        """Position after the last row that is known."""
        return self.offset + self.sequence.length + sum(len(rows) for rows in self.waiting)

    @property
    def guess(self) -> torch.Tensor | None:
        """The output for the last row; None while it waits."""
        return None if self.waiting else self.guesses.get(self.end - 1)

    def note(self, start: int, shallow: torch.Tensor, features: torch.Tensor | None) -> None:
        """See DraftState."""
        for known in [known for known in self.guesses if known < start - 1]:
            del self.guesses[known]  # nothing is ever drafted there again
        kind = self._net.shape.kind
        if kind != "feature":
            known = min(self.end, start + len(shallow)) - start  # the same rows as when they were drafts
            if known > 0:
                self._cut(start + known)
                start, shallow = start + known, shallow[known:]
        self._cut(start)
        if not len(shallow):
            return
        if kind == "feature" and features is None:
            features = self._net.mask.expand(len(shallow), -1)
        self.waiting.append(self._net.rows(shallow, features))

    def note_draft(self, position: int, shallow: torch.Tensor) -> None:
        """See DraftState."""
        if position > self.end:
            return  # the network does not know what is before it
        self._cut(position)
        before = self.guesses.get(position - 1)
        if self._net.shape.kind != "feature" or before is not None:
            self.waiting.append(self._net.rows(shallow, before))

    def forget(self, position: int) -> None:
        """See DraftState."""
        if position < self.end:
            self._cut(position)

    def _cut(self, position: int) -> None:
        """Forget the rows from `position` on."""
        end = self.end
        if position >= end:
            if position > end:  # rows are missing: begin anew behind the gap
                self.waiting.clear()
                self.sequence.length, self.offset = 0, position
                self.guesses.clear()
            return
        for known in [known for known in self.guesses if known >= position]:
            del self.guesses[known]
        while self.waiting and end > position:
            rows = self.waiting.pop()
            end -= len(rows)
            if end < position:
                self.waiting.append(rows[: position - end])
                end = position
        # The cache drops the rest when the next rows are run: they start before its end.
        self.sequence.length = min(self.sequence.length, max(0, position - self.offset))
        self.offset = min(self.offset, position)


class _Layer:
    """The network's attention over a paged cache, as LayerRunner wants it."""

    def __init__(self, net: DrafterNet, device: torch.device) -> None:
        self._net = net
        self.device = device
        self.hidden_size = net.shape.hidden_size

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        shape = self._net.shape
        heads = self._net.project(hidden)
        turned = rotate(heads[:, : shape.heads + shape.kv_heads], rotation(positions, shape)).transpose(0, 1)
        value = heads[:, shape.heads + shape.kv_heads :].transpose(0, 1)
        batch.store(0, turned[shape.heads :], value)
        if batch.cache_only:
            return hidden[:0]
        attended = batch.backend.attend(
            0, turned[: shape.heads], batch, scale=shape.head_dim**-0.5, window=None
        )
        return self._net.finish(hidden, attended.flatten(1))


class NetworkDrafter(Drafter):
    """A trained network with the rows of the head that it may draft."""

    def __init__(
        self,
        path: Path,
        ends: DeviceEnds,
        dtype: torch.dtype,
        weights_id: str,
        input_layers: int,
        *,
        kv_tokens: int,
        page_tokens: int = 16,
    ) -> None:
        """Load a drafter file.

        Raises:
            ModelError: it cannot be read, or was trained for another model or split.
        """
        super().__init__()
        check_fit(path, read_info(path), weights_id, input_layers)
        device = ends.device
        self._net, self._ids = load_drafter(path, dtype, device)
        shape = self._net.shape
        self.name = shape.kind
        self._head = packed_linear(ends.head_rows(self._ids))
        self._numpy_ids = self._ids.cpu().numpy()
        if can_pack(dtype, device):
            pack_linears(self._net)
        self._cache = KvCache(
            layers=1,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            num_pages=-(-kv_tokens // page_tokens) + 8,
            page_tokens=page_tokens,
            dtype=dtype,
            device=device,
        )
        self._runner = LayerRunner(_Layer(self._net, device), self._cache, make_backend("sdpa"))

    def open(self) -> NetworkState:
        """See Drafter."""
        return NetworkState(self._net)

    def propose(self, wishes: Sequence[Wish]) -> list[Draft | None]:
        """See Drafter. No draft where the last token's row was never seen, or where the cache is full."""
        ready = []
        for index, wish in enumerate(wishes):
            state = wish.state
            assert isinstance(state, NetworkState)
            if state.end == len(wish.tokens) and (state.waiting or state.guess is not None):
                ready.append((index, wish, state))
        self._run([state for _, _, state in ready if state.waiting])
        drafts: list[Draft | None] = [None] * len(wishes)
        ready = [one for one in ready if one[2].guess is not None]
        if ready:
            guesses = torch.cat([state.guess for _, _, state in ready if state.guess is not None])
            logits = self._head(guesses).float().cpu()
            for (index, wish, _), row in zip(ready, logits, strict=True):
                drafts[index] = choose(
                    row,
                    self._numpy_ids,
                    wish.params,
                    len(wish.tokens),
                    self.name,
                    with_proposal=wish.with_proposal,
                    others=wish.others,
                )
        return drafts

    def prepare(self, state: DraftState, tokens: Sequence[int]) -> None:
        """See Drafter."""
        assert isinstance(state, NetworkState)
        if sum(len(rows) for rows in state.waiting) > 1:
            self._run([state])

    def release(self, state: DraftState) -> None:
        """See Drafter."""
        assert isinstance(state, NetworkState)
        self._cache.release(state.sequence)
        state.waiting.clear()
        state.guesses.clear()

    @torch.inference_mode()
    def _run(self, states: Sequence[NetworkState]) -> None:
        """Take the waiting rows into the cache; each state's guess is then that for its last row."""
        states = [state for state in states if state.waiting]
        while states:
            segments = []
            for state in states:
                rows = torch.cat(state.waiting) if len(state.waiting) > 1 else state.waiting[0]
                first, rest = rows[:PASS_ROWS], rows[PASS_ROWS:]
                state.waiting = [rest] if len(rest) else []
                segments.append(Segment(state.sequence, state.sequence.length, first, offset=state.offset))
            try:
                outputs = self._runner.run(segments)
            except OutOfPages:
                for state in states:  # drafting is a help, not a need: these conversations go on without
                    self.release(state)
                return
            for state, output in zip(states, outputs, strict=True):
                state.guesses[state.end - 1 - sum(len(rows) for rows in state.waiting)] = output[
                    -1:
                ].clone()  # not the whole pass
            states = [state for state in states if state.waiting]
