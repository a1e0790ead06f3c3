"""A cache of prefixes that tenants share, as no HAT cloud has: the control of prefix_timing.py and of its short form.

Whoever sends rows that somebody has sent before gets the keys, values and deep states of then, without compute. A test
that finds nothing in HAT must find this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hat_runtime.model.runner import LayerRunner, Segment


@dataclass(frozen=True)
class _Kept:
    keys: torch.Tensor
    values: torch.Tensor
    deep: torch.Tensor


class CountingRunner(LayerRunner):
    """The real runner, which notes how many rows each pass computes."""

    def __init__(self, real: LayerRunner) -> None:
        super().__init__(real.layers, real.cache, real.backend)
        self.rows = 0
        """Rows computed so far."""

    def run(self, segments: list[Segment]) -> list[torch.Tensor]:
        """See LayerRunner."""
        self.rows += sum(len(segment.hidden) for segment in segments)
        return super().run(segments)


class SharingRunner(CountingRunner):
    """The same with a cache of whole first segments, across sessions and tenants."""

    def __init__(self, real: LayerRunner) -> None:
        super().__init__(real)
        self._kept: dict[bytes, _Kept] = {}

    def run(self, segments: list[Segment]) -> list[torch.Tensor]:
        """See LayerRunner; a segment that was seen before is not computed again."""
        if len(segments) != 1 or segments[0].start or segments[0].aside or not segments[0].wanted:
            return super().run(segments)
        (segment,) = segments
        rows, sequence = len(segment.hidden), segment.sequence
        name = hashlib.sha256(segment.hidden.contiguous().view(torch.uint8).numpy().tobytes()).digest()
        if (kept := self._kept.get(name)) is None:
            found = super().run(segments)
            slots = self.cache.slots(sequence, rows)
            self._kept[name] = _Kept(
                self.cache.keys[:, slots].clone(), self.cache.values[:, slots].clone(), found[0].clone()
            )
            return found
        self.cache.truncate(sequence, 0)
        self.cache.reserve(sequence, rows)
        slots = self.cache.slots(sequence, rows)
        self.cache.keys[:, slots] = kept.keys
        self.cache.values[:, slots] = kept.values
        sequence.length = rows
        return [kept.deep]


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """How well a figure tells two groups apart: the chance that one of `positive` is larger than one of `negative`.

    0.5: not at all. Ties count half (Mann and Whitney 1947).
    """
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))
