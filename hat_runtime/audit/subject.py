"""The split model under audit: what crosses the network while it answers prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hat_runtime.errors import UsageError
from hat_runtime.model.attention import make_backend
from hat_runtime.model.hf import (
    DecoderSlice,
    DeviceEnds,
    load_decoder_slice,
    load_device_ends,
    num_layers,
)
from hat_runtime.model.pages import PagedSequence
from hat_runtime.model.runner import LayerRunner, Segment, make_cache
from hat_runtime.model.sampling import SamplingParams, sample
from hat_runtime.model.split import LayerRange
from hat_runtime.wire.codec import RowCodec

PAGE_TOKENS = 16
CHUNK = 256
"""Tokens of a text in one pass."""


@dataclass(frozen=True)
class Crossed:
    """What one request sent over the network, as the cloud decodes it, and what it was about."""

    prompt: tuple[int, ...]
    secret: slice
    """Of `prompt`: the user's own tokens, without what the chat template puts around them."""
    answer: tuple[int, ...]
    shallow: torch.Tensor
    """[len(prompt) + len(answer) - 1, hidden_size]: the last token of an answer is not sent."""
    deep: torch.Tensor
    """[len(answer), hidden_size]: row i is what the device chose answer[i] from."""


class Subject:
    """A model cut at m: the ends, the device's layers and the cloud's. For one thread."""

    def __init__(self, ends: DeviceEnds, shallow: DecoderSlice, middle: DecoderSlice, kv_tokens: int) -> None:
        """kv_tokens: tokens that texts and candidates may hold together, of each slice."""
        backend = make_backend("sdpa")
        pages = -(-kv_tokens // PAGE_TOKENS)
        self.ends = ends
        self.hidden_size = shallow.hidden_size
        self.dtype = shallow.dtype
        self.vocab_size = ends.vocab_size
        self.shallow, self.middle = (
            LayerRunner(layers, make_cache(layers, num_pages=pages, page_tokens=PAGE_TOKENS), backend)
            for layers in (shallow, middle)
        )

    @classmethod
    def load(cls, folder: Path, input_layers: int, dtype: torch.dtype, kv_tokens: int = 16384) -> Subject:
        """A whole model's folder, cut behind `input_layers`.

        Raises:
            ModelError: the folder or its architecture cannot be used.
            UsageError: a part of the cut would be empty.
        """
        layers = num_layers(folder)
        if not 0 < input_layers < layers:
            raise UsageError(
                f"--input-layers {input_layers}: {folder} has {layers} layers, write 1 to {layers - 1}"
            )
        return cls(
            load_device_ends(folder, dtype),
            load_decoder_slice(folder, LayerRange(0, input_layers), dtype),
            load_decoder_slice(folder, LayerRange(input_layers, layers), dtype),
            kv_tokens,
        )

    def states(self, ids: Sequence[int]) -> torch.Tensor:
        """Shallow states [len(ids), hidden_size] of a text, before any codec."""
        sequence = PagedSequence()
        try:
            return torch.cat(
                [
                    self.shallow.run([Segment(sequence, first, self.embed(ids[first : first + CHUNK]))])[0]
                    for first in range(0, len(ids), CHUNK)
                ]
            )
        finally:
            self.shallow.cache.release(sequence)

    def embed(self, ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Embeddings [n, hidden_size] of token ids."""
        return self.ends.embed(torch.as_tensor(ids))

    def through(self, codec: RowCodec, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [n, hidden_size] as they are after the wire."""
        return codec.decode(codec.encode(hidden), len(hidden), self.hidden_size, self.dtype)

    def answer(
        self,
        prompts: Sequence[tuple[Sequence[int], slice]],
        codec: RowCodec,
        tokens: int,
        sampling: SamplingParams,
    ) -> list[Crossed]:
        """Answer all prompts at once through a codec, without servers, and note what crosses.

        Args:
            prompts: token ids with the slice of them that is the user's.
            codec: of all rows that go up.
            tokens: of each answer, at least 1; a stop token does not end it.
            sampling: how the device chooses.

        Raises:
            OutOfPages: more tokens than the subject was made for.
        """
        up, down = ([PagedSequence() for _ in prompts] for _ in range(2))
        new = [list(ids) for ids, _ in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        sent: list[list[torch.Tensor]] = [[] for _ in prompts]
        deep: list[list[torch.Tensor]] = [[] for _ in prompts]
        try:
            for _ in range(tokens):
                segments = [Segment(s, s.length, self.embed(ids)) for s, ids in zip(up, new, strict=True)]
                rows = [self.through(codec, states) for states in self.shallow.run(segments)]
                segments = [Segment(s, s.length, states) for s, states in zip(down, rows, strict=True)]
                for i, states in enumerate(self.middle.run(segments)):
                    sent[i].append(rows[i])
                    deep[i].append(states[-1:])
                    token = sample(self.ends.head(states[-1:])[0], sampling, down[i].length)
                    answers[i].append(token)
                    new[i] = [token]
        finally:
            for runner, sequences in ((self.shallow, up), (self.middle, down)):
                for sequence in sequences:
                    runner.cache.release(sequence)
        return [
            Crossed(tuple(ids), secret, tuple(answers[i]), torch.cat(sent[i]), torch.cat(deep[i]))
            for i, (ids, secret) in enumerate(prompts)
        ]
