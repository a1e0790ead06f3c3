"""The whole model, run as the two sides run it: what a drafter learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hat_runtime.errors import UsageError
from hat_runtime.model.attention import make_backend
from hat_runtime.model.hf import (
    context_length,
    eos_token_ids,
    load_decoder_slice,
    load_device_ends,
    num_layers,
)
from hat_runtime.model.pages import PagedSequence
from hat_runtime.model.runner import LayerRunner, Segment, make_cache
from hat_runtime.model.split import LayerRange

_PAGE_TOKENS = 16


@dataclass(eq=False)
class TeacherText:
    """One text's place in the KV caches of both halves."""

    lower: PagedSequence = field(default_factory=PagedSequence)
    upper: PagedSequence = field(default_factory=PagedSequence)

    @property
    def length(self) -> int:
        """Tokens that the caches hold."""
        return self.lower.length


@dataclass(frozen=True)
class States:
    """What device and cloud would see of a run of tokens: [n, hidden_size] each."""

    shallow: torch.Tensor
    """After the device's layers."""
    deep: torch.Tensor
    """After the cloud's layers, before the final norm."""


class Teacher:
    """A whole model, cut where device and cloud cut it. Use from one thread."""

    def __init__(
        self, folder: Path, input_layers: int, dtype: torch.dtype, device: str, *, kv_tokens: int
    ) -> None:
        """Load everything.

        Args:
            folder: a prepared model, whole.
            input_layers: m, the device's layers.
            dtype: compute dtype.
            device: torch device.
            kv_tokens: tokens that all texts together may hold.

        Raises:
            ModelError: the folder cannot be used.
            UsageError: there is no such split.
        """
        where, total = torch.device(device), num_layers(folder)
        if not 0 < input_layers < total:
            raise UsageError(
                f"--input-layers {input_layers}: the model has {total} layers, so 1 to {total - 1}"
            )
        pages = -(-kv_tokens // _PAGE_TOKENS)
        backend = make_backend("sdpa")
        lower = load_decoder_slice(folder, LayerRange(0, input_layers), dtype, where)
        upper = load_decoder_slice(folder, LayerRange(input_layers, total), dtype, where)
        self.ends = load_device_ends(folder, dtype, where)
        self.context_length = context_length(folder)
        self.eos_token_ids = eos_token_ids(folder)
        self.hidden_size = lower.hidden_size
        self._lower = LayerRunner(
            lower, make_cache(lower, num_pages=pages, page_tokens=_PAGE_TOKENS), backend
        )
        self._upper = LayerRunner(
            upper, make_cache(upper, num_pages=pages, page_tokens=_PAGE_TOKENS), backend
        )

    @torch.inference_mode()
    def run(self, texts: Sequence[TeacherText], new_ids: Sequence[Sequence[int]]) -> list[States]:
        """Append tokens to texts, in one pass.

        Raises:
            OutOfPages: the texts do not fit into the caches.
        """
        counts = [len(ids) for ids in new_ids]
        embedded = self.ends.embed(torch.tensor([token for ids in new_ids for token in ids]))
        rows: tuple[torch.Tensor, ...] = embedded.split(counts)  # type: ignore[no-untyped-call]
        shallow = self._lower.run(
            [Segment(text.lower, text.length, part) for text, part in zip(texts, rows, strict=True)]
        )
        deep = self._upper.run(
            [Segment(text.upper, text.upper.length, part) for text, part in zip(texts, shallow, strict=True)]
        )
        return [States(low, high) for low, high in zip(shallow, deep, strict=True)]

    def release(self, text: TeacherText) -> None:
        """Give back what a text holds in the caches."""
        self._lower.cache.release(text.lower)
        self._upper.cache.release(text.upper)
