"""The device's share of the model: embedding, input layers and head, run by one worker thread for all sessions.

One thread, because torch keeps an OpenMP team per calling thread, and because whatever waits when the thread
comes back is one batch: the head over all rows at once, then the input layers over all new tokens at once.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hat_runtime.device.sampling import SamplingParams, sample
from hat_runtime.errors import HatError
from hat_runtime.model.attention import make_backend
from hat_runtime.model.hf import (
    DecoderSlice,
    DeviceEnds,
    context_length,
    eos_token_ids,
    load_decoder_slice,
    load_device_ends,
)
from hat_runtime.model.pages import KvCache, OutOfPages, PagedSequence
from hat_runtime.model.runner import LayerRunner, Segment, make_cache
from hat_runtime.model.split import LayerRange

log = logging.getLogger(__name__)

_BATCH_TOKENS = 512
"""New tokens after which the worker stops collecting jobs for one pass, so that short jobs do not wait long."""


class DeviceFull(HatError):
    """The device's KV pages cannot hold the session; others must end first."""


@dataclass(frozen=True)
class Advanced:
    """One decoding step on the device."""

    token_id: int
    hidden: torch.Tensor | None
    """Shallow state [1, hidden_size] of the new token; None for a stop token or where none was asked for."""


@dataclass
class _Job:
    sequence: PagedSequence
    future: asyncio.Future[Any]
    ids: list[int] = field(default_factory=list)
    start: int = 0
    deep: torch.Tensor | None = None
    """[1, hidden_size] where the job begins with head and sampling: its token becomes `ids`."""
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    embed_new: bool = True


class DeviceModel:
    """Input and output submodel with the KV cache of this device's sessions.

    All methods are for the event loop's thread; the tensors belong to the worker thread.
    """

    def __init__(
        self,
        ends: DeviceEnds,
        layers: DecoderSlice,
        cache: KvCache,
        runner: LayerRunner,
        *,
        context_length: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.layers = layers.layers
        self.hidden_size = layers.hidden_size
        self.dtype = layers.dtype
        self.vocab_size = ends.vocab_size
        self.context_length = context_length
        self.eos_token_ids = eos_token_ids
        self.cache = cache
        self.shallow_s_per_token = 0.0
        """Duration of the latest input pass of at least 16 tokens, per token."""
        self._ends = ends
        self._runner = runner
        self._queue: queue.SimpleQueue[_Job | Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="hat-device-model", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        folder: Path,
        input_layers: int,
        dtype: torch.dtype,
        *,
        device: str = "cpu",
        attention: str = "sdpa",
        kv_tokens: int = 32768,
        page_tokens: int = 16,
    ) -> DeviceModel:
        """Load embedding, layers 0:input_layers, final norm and head from a model folder (whole or device part).

        Args:
            folder: as `hat model prepare` writes it, or any folder of safetensors.
            input_layers: m, which the cloud dictates (Describe).
            dtype: compute dtype of both sides.
            device: torch device.
            attention: backend, as `make_backend` names it.
            kv_tokens: tokens that all sessions of this device may hold together.
            page_tokens: tokens of one KV page.

        Raises:
            ModelError: the folder or its architecture cannot be used.
        """
        where = torch.device(device)
        layers = load_decoder_slice(folder, LayerRange(0, input_layers), dtype, where)
        ends = load_device_ends(folder, dtype, where)
        cache = make_cache(layers, num_pages=-(-kv_tokens // page_tokens), page_tokens=page_tokens)
        return cls(
            ends,
            layers,
            cache,
            LayerRunner(layers, cache, make_backend(attention)),
            context_length=context_length(folder),
            eos_token_ids=eos_token_ids(folder),
        )

    async def shallow(self, sequence: PagedSequence, ids: Sequence[int], start: int) -> torch.Tensor:
        """Embed `ids` and run the input layers on them, at positions start, start + 1, ...

        A start before the sequence's end truncates the sequence first.

        Returns:
            Shallow hidden states [len(ids), hidden_size].

        Raises:
            DeviceFull: too few KV pages; the sequence ends at `start` at most.
        """
        future: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
        self._queue.put(_Job(sequence, future, list(ids), start))
        return await future

    async def advance(
        self,
        sequence: PagedSequence,
        deep: torch.Tensor,
        params: SamplingParams,
        position: int,
        stop_ids: frozenset[int] = frozenset(),
        *,
        embed_new: bool = True,
    ) -> Advanced:
        """Head, sampling, and the shallow state of the new token, in one hop to the worker.

        Args:
            sequence: holds `position` tokens.
            deep: deep state [1, hidden_size] of the last of them.
            params: how to sample.
            position: absolute index of the new token.
            stop_ids: tokens that end the text, so that no shallow state is needed.
            embed_new: False for the last token of a text.

        Raises:
            DeviceFull: too few KV pages. The same call may be repeated: it gives the same token.
        """
        future: asyncio.Future[Advanced] = asyncio.get_running_loop().create_future()
        self._queue.put(_Job(sequence, future, [], position, deep, params, stop_ids, embed_new))
        return await future

    def release(self, sequence: PagedSequence) -> None:
        """Give back the sequence's pages, after the jobs that are already queued."""
        self._queue.put(lambda: self.cache.release(sequence))

    async def call(self, function: Callable[[], None]) -> None:
        """Run a function on the worker thread, between passes, and wait for it."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def run() -> None:
            try:
                function()
                _deliver([(done, None)])
            except Exception as error:
                _deliver([(done, error)])

        self._queue.put(run)
        await done

    async def close(self) -> None:
        """Stop the worker after the jobs that are queued."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    # Everything below runs on the worker thread.

    @torch.inference_mode()
    def _work(self) -> None:
        waiting: deque[_Job | Callable[[], None] | None] = deque()
        while True:
            if not waiting:
                waiting.append(self._queue.get())
            while not self._queue.empty():
                waiting.append(self._queue.get())
            jobs: list[_Job] = []
            while waiting and isinstance(waiting[0], _Job) and self._fits(waiting[0], jobs):
                job = waiting.popleft()
                assert isinstance(job, _Job)
                if not job.future.cancelled():
                    jobs.append(job)
            if jobs:
                self._run_safely(jobs)
            elif waiting and not isinstance(waiting[0], _Job):
                function = waiting.popleft()
                if function is None:
                    return
                assert not isinstance(function, _Job)
                function()

    @staticmethod
    def _fits(job: _Job, jobs: list[_Job]) -> bool:
        # A second job of one sequence, left by a cancelled request, needs a pass of its own.
        return not jobs or (
            sum(max(1, len(other.ids)) for other in jobs) + len(job.ids) <= _BATCH_TOKENS
            and all(other.sequence is not job.sequence for other in jobs)
        )

    def _run_safely(self, jobs: list[_Job]) -> None:
        try:
            self._run(jobs)
        except Exception as error:
            log.exception("a pass over %d sessions failed on the device", len(jobs))
            _deliver([(job.future, error) for job in jobs])

    def _run(self, jobs: list[_Job]) -> None:
        self._sample([job for job in jobs if job.deep is not None])
        results: dict[int, Any] = {}
        running: list[_Job] = []
        for job in jobs:
            if not job.embed_new:
                results[id(job)] = Advanced(job.ids[0], None)
                continue
            try:
                self._make_room(job)
                running.append(job)
            except OutOfPages as error:
                results[id(job)] = DeviceFull(
                    f"the device's KV cache is full: {job.start + len(job.ids)} tokens do not fit ({error}); "
                    "end other sessions or raise the device's KV tokens"
                )
        for job, hidden in zip(running, self._input_pass(running), strict=True):
            results[id(job)] = hidden if job.deep is None else Advanced(job.ids[0], hidden)
        _deliver([(job.future, results[id(job)]) for job in jobs])

    def _sample(self, jobs: list[_Job]) -> None:
        """Head and sampling: fills in `ids`, and clears `embed_new` where a stop token came."""
        if not jobs:
            return
        logits = self._ends.head(torch.cat([job.deep for job in jobs if job.deep is not None]))
        for job, row in zip(jobs, logits, strict=True):
            token = sample(row, job.params, job.start)
            job.ids = [token]
            job.embed_new = job.embed_new and token not in job.stop_ids

    def _make_room(self, job: _Job) -> None:
        if job.start < job.sequence.length:
            self.cache.truncate(job.sequence, job.start)
        self.cache.reserve(job.sequence, job.start + len(job.ids))

    def _input_pass(self, jobs: list[_Job]) -> list[torch.Tensor]:
        if not jobs:
            return []
        began = time.perf_counter()
        embedded = self._ends.embed(torch.tensor([token for job in jobs for token in job.ids]))
        parts: tuple[torch.Tensor, ...] = embedded.split([len(job.ids) for job in jobs])  # type: ignore[no-untyped-call]
        hidden = self._runner.run(
            [Segment(job.sequence, job.start, part) for job, part in zip(jobs, parts, strict=True)]
        )
        if len(embedded) >= 16:
            self.shallow_s_per_token = (time.perf_counter() - began) / len(embedded)
        return hidden


def _deliver(results: list[tuple[asyncio.Future[Any], Any]]) -> None:
    """Hand results (or exceptions) to the event loop: one wake-up for the whole batch."""

    def resolve() -> None:
        for future, result in results:
            if future.done():  # its request was cancelled
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

    try:
        results[0][0].get_loop().call_soon_threadsafe(resolve)
    except RuntimeError:
        log.debug("a result came after its event loop was closed")
