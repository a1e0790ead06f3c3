"""Token mode: the device's small language model, whole, and the thread that drafts with it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from hat_runtime.device.submodels import DeviceModel
from hat_runtime.device.worker import DeviceFull, Job, Worker, deliver
from hat_runtime.model.hf import num_layers
from hat_runtime.model.pages import OutOfPages, PagedSequence
from hat_runtime.model.sampling import SamplingParams, probabilities, sample, stream_seed
from hat_runtime.model.speculation import DRAFT_STREAM


@dataclass(frozen=True)
class Draft:
    """A proposed token."""

    token: int
    q: float = 0.0
    """Its probability in `distribution`; 0 where the sampler does not need it."""
    distribution: NDArray[np.float64] | None = None
    """The draft model's, [vocabulary]."""


@dataclass(eq=False)
class DraftJob(Job):
    """New tokens of one text; the token after them is drafted where `proposes`."""

    proposes: bool = False
    separate: bool = False
    """The target does not share the draft's noise: the draft needs noise of its own, and tells its distribution."""


class DraftWorker(Worker):
    """Runs draft jobs: layers over all new tokens at once, then the head over the rows that propose."""

    def _run(self, jobs: list[Job]) -> None:
        results: dict[int, Any] = {id(job): None for job in jobs}
        running: list[Job] = []
        for job in jobs:
            try:
                self._make_room(job)
                running.append(job)
            except OutOfPages as error:
                results[id(job)] = DeviceFull(
                    f"the device's KV cache is full: {job.start + len(job.ids)} tokens do not fit ({error}); "
                    "end other sessions or raise the device's KV tokens"
                )
        hidden = self._input_pass(running)
        proposing = [
            (job, rows[-1:])
            for job, rows in zip(running, hidden, strict=True)
            if isinstance(job, DraftJob) and job.proposes
        ]
        if proposing:
            logits = self._ends.head(torch.cat([rows for _, rows in proposing]))
            for (job, _), row in zip(proposing, logits, strict=True):
                results[id(job)] = _propose(job, row)
        deliver([(job.future, results[id(job)]) for job in jobs])


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
            [DraftJob(sequence, future, list(ids), start, None, params, proposes=proposes, separate=separate)]
        )
        return await future
