"""The device's share of the model: embedding, input layers and head, with the KV cache of its sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import torch

from hat_runtime.device.sampling import SamplingParams
from hat_runtime.device.worker import Advanced, DeviceFull, Job, Worker, deliver
from hat_runtime.model.attention import make_backend
from hat_runtime.model.hf import (
    DecoderSlice,
    DeviceEnds,
    context_length,
    eos_token_ids,
    load_decoder_slice,
    load_device_ends,
)
from hat_runtime.model.pages import KvCache, PagedSequence
from hat_runtime.model.runner import LayerRunner, make_cache
from hat_runtime.model.split import LayerRange

__all__ = ["Advanced", "DeviceFull", "DeviceModel"]

_GATHER_S = 0.001
"""Wait for the other deep states of one cloud pass, which arrive as one message each."""


class DeviceModel:
    """Input and output submodel with the KV cache of this device's sessions.

    All methods are for the event loop's thread; the tensors belong to the worker thread.
    """

    worker_type: type[Worker] = Worker

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
        self._worker = self.worker_type(ends, runner)
        self.rounds_in_flight = 0
        """Rounds that this device's sessions have sent and not got back yet (kept by the sessions)."""
        self._gathered: list[Job] = []
        self._gather_timer: asyncio.TimerHandle | None = None

    @property
    def shallow_s_per_token(self) -> float:
        """Duration of the latest input pass of at least 16 tokens, per token; 0 before there was one."""
        return self._worker.shallow_s_per_token

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
    ) -> Self:
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
        self._worker.submit([Job(sequence, future, list(ids), start)])
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
        batch_tokens: int = 0,
    ) -> Advanced:
        """Head, sampling, and the shallow state of the new token, in one hop to the worker.

        Args:
            sequence: holds `position` tokens.
            deep: deep state [1, hidden_size] of the last of them.
            params: how to sample.
            position: absolute index of the new token.
            stop_ids: tokens that end the text, so that no shallow state is needed.
            embed_new: False for the last token of a text.
            batch_tokens: rows of the cloud's pass that `deep` comes from. If other rounds of this device may have
                been in it, they are waited for (1 ms at most): sessions that are batched once stay batched, here
                and in the cloud.

        Raises:
            DeviceFull: too few KV pages. The same call may be repeated: it gives the same token.
        """
        future: asyncio.Future[Advanced] = asyncio.get_running_loop().create_future()
        self._gathered.append(Job(sequence, future, [], position, deep, params, stop_ids, embed_new))
        if len(self._gathered) >= min(batch_tokens, len(self._gathered) + self.rounds_in_flight):
            self._flush()
        elif self._gather_timer is None:
            self._gather_timer = asyncio.get_running_loop().call_later(_GATHER_S, self._flush)
        return await future

    def _flush(self) -> None:
        if self._gather_timer is not None:
            self._gather_timer.cancel()
            self._gather_timer = None
        gathered, self._gathered = self._gathered, []
        if gathered:
            self._worker.submit(gathered)

    def release(self, sequence: PagedSequence) -> None:
        """Give back the sequence's pages, after the jobs that are already queued."""
        self._worker.call(lambda: self.cache.release(sequence))

    async def call(self, function: Callable[[], None]) -> None:
        """Run a function on the worker thread, between passes, and wait for it."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def run() -> None:
            try:
                function()
                deliver([(done, None)])
            except Exception as error:
                deliver([(done, error)])

        self._worker.call(run)
        await done

    async def close(self) -> None:
        """Stop the worker after the jobs that are queued."""
        await asyncio.to_thread(self._worker.stop)
