"""Token mode: the device's small language model, whole, and the thread that drafts with it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from hat_runtime.device.jobs import Job
from hat_runtime.device.submodels import DeviceModel
from hat_runtime.device.worker import Worker
from hat_runtime.model.hf import num_layers
from hat_runtime.model.pages import PagedSequence
from hat_runtime.model.sampling import SamplingParams, probabilities, sample, stream_seed
from hat_runtime.model.speculation import DRAFT_STREAM

MODEL = "model"
TRUST = 0.4
"""How often a draft model is taken to be right before anything was seen of it."""


@dataclass(frozen=True)
class Draft:
    """A proposed token."""

    token: int
    q: float = 0.0
    """Its probability in `distribution`; 0 where the sampler does not need it."""
    distribution: NDArray[np.float64] | None = None
    """The draft model's, [vocabulary]."""
    source: str = MODEL
    confidence: float = TRUST
    """0 to 1, for Calibration."""


class DraftJob(Job):
    """New tokens of one text; the token after them is drafted where `proposes`."""

    def __init__(
        self,
        sequence: PagedSequence,
        future: asyncio.Future[Draft | None],
        ids: list[int],
        start: int,
        params: SamplingParams,
        *,
        proposes: bool,
        separate: bool,
    ) -> None:
        """As DraftModel.draft."""
        super().__init__(sequence, future)
        self.ids, self.start = ids, start
        self.params = params
        self.proposes = proposes
        self.separate = separate
        self.last: torch.Tensor | None = None
        """The last layer's output [1, hidden_size] for the last token."""
        self.draft: Draft | None = None

    def embedded(self, hidden: torch.Tensor) -> None:
        """See Job."""
        self.last = hidden[-1:]

    def result(self) -> Draft | None:
        """See Job."""
        return self.draft


class DraftWorker(Worker):
    """Runs draft jobs: layers over all new tokens at once, then the head over the rows that propose."""

    def _finish(self, jobs: list[Job]) -> None:
        proposing = [job for job in jobs if isinstance(job, DraftJob) and job.proposes]
        if not proposing:
            return
        logits = self._ends.head(torch.cat([job.last for job in proposing if job.last is not None]))
        for job, row in zip(proposing, logits, strict=True):
            job.draft = _propose(job, row)


def _propose(job: DraftJob, logits: torch.Tensor) -> Draft:
    position, params = job.start + len(job.ids), job.params
    if not job.separate:
        return Draft(sample(logits, params, position))
    distribution = probabilities(logits, params)
    token = sample(logits, replace(params, seed=stream_seed(params.seed, DRAFT_STREAM)), position)
    return Draft(token, float(np.float32(distribution[token])), distribution)


class DraftModel(DeviceModel):
    """A whole small model. For the event loop's thread, as DeviceModel."""

    worker_type = DraftWorker

    @classmethod
    def load_whole(
        cls, folder: Path, dtype: torch.dtype, *, device: str, kv_tokens: int, page_tokens: int
    ) -> Self:
        """Load all of a folder; arguments and errors as DeviceModel.load."""
        layers = num_layers(folder)
        return cls.load(folder, layers, dtype, device=device, kv_tokens=kv_tokens, page_tokens=page_tokens)

    async def draft(
        self,
        sequence: PagedSequence,
        ids: Sequence[int],
        start: int,
        params: SamplingParams,
        *,
        proposes: bool = True,
        separate: bool = False,
    ) -> Draft | None:
        """Run `ids` at positions start, start + 1, ... and propose the token after them.

        Args:
            sequence: a start before its end truncates it first.
            ids: new tokens, at least one.
            start: position of the first.
            params: how the draft is chosen.
            proposes: False: only fill the KV cache; None is returned.
            separate: draw with noise that the target does not share, and tell the distribution.

        Raises:
            DeviceFull: too few KV pages.
        """
        future: asyncio.Future[Draft | None] = asyncio.get_running_loop().create_future()
        self._worker.submit(
            [DraftJob(sequence, future, list(ids), start, params, proposes=proposes, separate=separate)]
        )
        return await future
