"""The device's share of the model: embedding, input layers and head, with the KV cache of its sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import torch

from hat_runtime.control.pass_cost import PassCost
from hat_runtime.device.chain import DraftPlan, Speculation
from hat_runtime.device.drafting.base import Drafter, DraftState
from hat_runtime.device.jobs import DeviceFull, Job, ShallowJob, Turn, TurnJob
from hat_runtime.device.worker import Worker, deliver
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

__all__ = ["DeviceFull", "DeviceModel", "Turn"]

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
        drafter: Drafter | None = None,
    ) -> None:
        self.drafter = drafter
        self.layers = layers.layers
        self.hidden_size = layers.hidden_size
        self.dtype = layers.dtype
        self.vocab_size = ends.vocab_size
        self.context_length = context_length
        self.eos_token_ids = eos_token_ids
        self.cache = cache
        self._worker = self.worker_type(ends, runner, drafter)
        self.rounds_in_flight = 0
        """Rounds that this device's sessions have sent and not got back yet (kept by the sessions)."""
        self._gathered: list[Job] = []
        self._gathered_rows = 0
        self._gather_timer: asyncio.TimerHandle | None = None

    @property
    def shallow_s_per_token(self) -> float:
        """Duration of the latest input pass of at least 16 tokens, per token; 0 before there was one."""
        return self._worker.shallow_s_per_token

    @property
    def shallow_cost(self) -> PassCost | None:
        """What a pass of the input layers costs, as seen lately; None while that is not known."""
        return self._worker.shallow_cost.fit()

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
        make_drafter: Callable[[DeviceEnds], Drafter | None] = lambda ends: None,
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
            make_drafter: makes what drafts, from embedding and head.

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
            drafter=make_drafter(ends),
        )

    async def shallow(
        self, sequence: PagedSequence, ids: Sequence[int], start: int, state: DraftState | None = None
    ) -> torch.Tensor:
        """Embed `ids` and run the input layers on them, at positions start, start + 1, ...

        A start before the sequence's end truncates the sequence first.

        Args:
            sequence: holds at least `start` tokens.
            ids: at least one.
            start: position of the first.
            state: the drafter's memory of the text, which is told of them.

        Returns:
            Shallow hidden states [len(ids), hidden_size].

        Raises:
            DeviceFull: too few KV pages; the sequence ends at `start` at most.
        """
        future: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
        self._worker.submit([ShallowJob(sequence, future, list(ids), start, state)])
        return await future

    async def turn(
        self,
        speculation: Speculation,
        deep: torch.Tensor | None,
        plan: DraftPlan,
        *,
        alternatives: tuple[tuple[int, int], ...] = (),
        most: int = 1,
        go_on: bool = True,
        branch: int | None = None,
        batch_tokens: int = 0,
        told: asyncio.Future[list[int]] | None = None,
    ) -> Turn:
        """Judge deep states, if any, by head and sampling; then run what is new through the input layers, and draft.

        Args:
            speculation: the answer's certain tokens and drafts; changed in place.
            deep: deep states [n, hidden_size] of the last certain token and of the n - 1 drafts behind it, and then of
                the alternatives; or None.
            plan: how far to draft.
            alternatives: (position, token) of each alternative.
            most: tokens that the text may still grow by.
            go_on: draft behind a chain that holds as well; False: only behind a fresh token.
            branch: draft what follows if this token, and not the chain's, comes behind the drafts that were sent.
            batch_tokens: rows of the cloud's pass that `deep` comes from. If other rounds of this device may have
                been in it, they are waited for (1 ms at most): sessions that are batched once stay batched, here
                and in the cloud.
            told: gets the certain tokens before there are drafts.
        """
        future: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
        job = TurnJob(
            speculation,
            future,
            deep,
            plan,
            alternatives=alternatives,
            most=most,
            go_on=go_on,
            branch=branch,
            told=told,
        )
        if deep is None:
            self._worker.submit([job])
            return await future
        self._gathered.append(job)
        self._gathered_rows += len(deep)
        if self._gathered_rows >= batch_tokens or self.rounds_in_flight == 0:
            self._flush()
        elif self._gather_timer is None:
            self._gather_timer = asyncio.get_running_loop().call_later(_GATHER_S, self._flush)
        return await future

    def _flush(self) -> None:
        if self._gather_timer is not None:
            self._gather_timer.cancel()
            self._gather_timer = None
        gathered, self._gathered = self._gathered, []
        self._gathered_rows = 0
        if gathered:
            self._worker.submit(gathered)

    def open_drafting(self) -> DraftState:
        """The drafter's memory of a new conversation."""
        return DraftState() if self.drafter is None else self.drafter.open()

    def prepare_drafts(self, state: DraftState, tokens: Sequence[int]) -> None:
        """Let the drafter take in the text so far, after the jobs that are already queued: the device is idle now."""
        if self.drafter is not None:
            drafter = self.drafter
            self._worker.call(lambda: drafter.prepare(state, tokens))

    def release(self, sequence: PagedSequence, state: DraftState | None = None) -> None:
        """Give back the sequence's pages and the drafter's, after the jobs that are already queued."""

        def run() -> None:
            self.cache.release(sequence)
            if self.drafter is not None and state is not None:
                self.drafter.release(state)

        self._worker.call(run)

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
