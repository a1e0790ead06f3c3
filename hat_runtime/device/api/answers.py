"""Generating the answers of one request: one per prompt, side by side, and freed when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import cast

from starlette.types import Receive

from hat_runtime.device.api.errors import CLIENT_GONE, ApiError
from hat_runtime.device.api.gate import Gate
from hat_runtime.device.api.schemas import AnswerOptions
from hat_runtime.device.chat import PromptEncoder
from hat_runtime.device.generator import Generator
from hat_runtime.device.offline import CloudPresence, OfflineGenerator
from hat_runtime.device.request import STOP, GenerationRequest, GenerationStats, TokenEvent
from hat_runtime.device.text import TokenText
from hat_runtime.errors import CloudOverloaded, CloudUnavailable

QUEUE_PIECES = 256
"""Pieces of text that may wait for a client that reads slowly; then its answer waits."""


@dataclass(frozen=True)
class Offline:
    """What answers new requests while the cloud is away."""

    generator: OfflineGenerator
    presence: CloudPresence


@dataclass(frozen=True)
class Served:
    """A loaded model."""

    generator: Generator
    encoder: PromptEncoder
    fingerprint: str
    """Changes with the model or its configuration (OpenAI's system_fingerprint)."""
    offline: Offline | None = None
    """None: without the cloud requests are refused."""


@dataclass(frozen=True)
class Piece:
    """More of one of the answers; the last piece has the reason for its end, "stop" or "length"."""

    index: int
    tokens: Sequence[TokenText]
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        """Of all its tokens; "" only in a last piece."""
        return "".join(token.text for token in self.tokens)


class Answers:
    """The answers to the prompts of one request, being generated.

    Made by `start`; `close` must be called, whatever happens. All of them are the model's, or all are the small
    model's alone: that is settled with the first token, or with `settle`.
    """

    def __init__(
        self,
        served: Served,
        options: AnswerOptions,
        prompts: Sequence[list[int]],
        request_id: str,
        gate: Gate,
    ) -> None:
        """See `start`."""
        self._served = served
        self._options = options
        self._request_id = request_id
        self._gate = gate
        self.offline = served.offline is not None and served.offline.presence.away is not None
        """The small model answers alone."""
        self.settled = served.offline is None or self.offline
        """Whether that stays so."""
        self.requests = [self._request(ids) for ids in prompts]
        self._queue: asyncio.Queue[Piece | BaseException] = asyncio.Queue(QUEUE_PIECES)
        self._ahead: Piece | BaseException | None = None
        self._failure: ApiError | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(
        cls,
        served: Served,
        prompts: Sequence[list[int]],
        options: AnswerOptions,
        request_id: str,
        gate: Gate,
        receive: Receive,
    ) -> Answers:
        """Check the prompts, wait for a turn, and begin.

        Args:
            served: the model.
            prompts: token ids, one list for each answer.
            options: how to answer.
            request_id: names the request in the logs of both sides.
            gate: limits what runs at once.
            receive: of the HTTP request, whose body has been read: the client's going away ends the work.

        Raises:
            ApiError: a prompt that does not fit, no turn, or the client went away while waiting.
        """
        answers = cls(served, options, prompts, request_id, gate)
        gate.come(answers.abort)
        answers._tasks.append(asyncio.create_task(answers._watch(receive)))
        try:
            await answers._admit()
        except BaseException:
            await answers.close()
            raise
        for index in range(len(prompts)):
            task = asyncio.create_task(answers._run(index) if index == 0 else answers._run_in_turn(index))
            if index == 0:  # it has the turn that was just given, even if it is cancelled before it starts
                task.add_done_callback(lambda _: gate.leave())
            answers._tasks.append(task)
        return answers

    async def pieces(self, quiet_s: float | None = None) -> AsyncGenerator[Piece | None, None]:
        """The answers' text as it comes, those of several prompts in any order.

        Args:
            quiet_s: yield None after every so many seconds without text.

        Raises:
            ApiError: 499 where the client went away, 503 where `abort` was called.
            HatError: as the generator raises it.
        """
        open_answers = len(self.requests)
        while open_answers:
            item = await self._next(quiet_s)
            if isinstance(item, BaseException):
                raise item
            open_answers -= item is not None and item.finish_reason is not None
            yield item

    def settle(self) -> None:
        """The reply begins: who answers is told in its head, and does not change any more."""
        self.settled = True

    def stats(self) -> list[GenerationStats]:
        """Figures of the answers that have been generated, or were until they were cut off."""
        return [request.stats for request in self.requests]

    def abort(self, error: ApiError) -> None:
        """End all work; `pieces` raises `error`."""
        if self._failure is None:
            self._failure = error
            if not self._queue.full():
                self._queue.put_nowait(error)  # wakes `pieces`
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def close(self) -> None:
        """End what still runs, and wait until its sessions are free."""
        for task in self._tasks:
            task.cancel()
        try:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            self._gate.go(self.abort)

    async def _admit(self) -> None:
        entering = asyncio.create_task(self._gate.admit())
        self._tasks.append(entering)
        try:
            await entering
        except asyncio.CancelledError:
            if entering.done() and not entering.cancelled() and entering.exception() is None:
                self._gate.leave()  # the turn came at the very moment
            if self._failure is not None:
                raise self._failure from None
            raise

    async def _watch(self, receive: Receive) -> None:
        # Starlette cancels only streaming replies; whoever waits for a whole answer may go away, too.
        while (await receive())["type"] != "http.disconnect":
            pass
        self.abort(ApiError(CLIENT_GONE, "the client went away", code="client_gone"))

    async def _run_in_turn(self, index: int) -> None:
        await self._gate.enter()
        try:
            await self._run(index)
        finally:
            self._gate.leave()

    async def _run(self, index: int) -> None:
        try:
            try:
                await self._generate(index)
            except CloudUnavailable as error:
                if not await self._goes_offline(error):
                    raise
                self.requests[index] = self._request(self.requests[index].prompt_ids)
                await self._generate(index)
        except Exception as error:
            await self._queue.put(error)

    async def _goes_offline(self, error: CloudUnavailable) -> bool:
        """Whether the small model is to answer in place of the cloud, which has said nothing yet."""
        offline = self._served.offline
        if offline is None or isinstance(error, CloudOverloaded):
            return False
        if self.settled:
            offline.presence.suspect()
        elif await offline.presence.is_away() and not self.settled:
            self.offline = self.settled = True
        return self.offline

    def _request(self, prompt_ids: list[int]) -> GenerationRequest:
        online, offline = self._served.generator, self._served.offline
        context = offline.generator.context_tokens if offline and self.offline else online.context_tokens
        return GenerationRequest(
            prompt_ids=prompt_ids,
            max_new_tokens=_room(len(prompt_ids), self._options.max_tokens, context),
            sampling=self._options.sampling,
            stop_ids=online.model.eos_token_ids,
            request_id=self._request_id,
            chunk_tokens=self._options.chunk_tokens,
        )

    def _events(self, request: GenerationRequest, *, alone: bool) -> AsyncIterator[TokenEvent]:
        if alone and self._served.offline is not None:
            return self._served.offline.generator.generate(request)
        return self._served.generator.generate(request)

    async def _generate(self, index: int) -> None:
        request, alone = self.requests[index], self.offline
        text = self._served.encoder.detokenizer.marked_stream(self._options.stop)
        events = cast("AsyncGenerator[TokenEvent, None]", self._events(request, alone=alone))
        async with contextlib.aclosing(events):
            async for event in events:
                if alone is not self.offline:
                    raise CloudUnavailable("another answer of this request found the cloud away")
                self.settled = True
                if event.token_id in request.stop_ids:
                    text.skip(event.kind)
                elif tokens := text.feed(event.token_id, event.kind):
                    await self._queue.put(Piece(index, tokens))
                if text.stopped and not event.more:  # what is counted is told, if without text
                    request.stats.finish_reason = STOP
                    break
        await self._queue.put(Piece(index, text.finish(), request.stats.finish_reason))

    async def _next(self, quiet_s: float | None) -> Piece | BaseException | None:
        """The next piece, joined with what else is there of the same answer; None after `quiet_s` without any."""
        item, self._ahead = self._ahead, None
        if item is None:
            try:
                async with asyncio.timeout(quiet_s):
                    item = await self._queue.get()
            except TimeoutError:
                return None
        if self._failure is not None:
            return self._failure
        while isinstance(item, Piece) and item.finish_reason is None and not self._queue.empty():
            following = self._queue.get_nowait()
            if not isinstance(following, Piece) or following.index != item.index:
                self._ahead = following
                break
            item = Piece(item.index, [*item.tokens, *following.tokens], following.finish_reason)
        return item


def _room(prompt_tokens: int, max_tokens: int | None, context: int) -> int:
    """Tokens that the answer may have.

    Raises:
        ApiError: 400 with the numbers, where prompt and answer do not fit the context together.
    """
    if prompt_tokens == 0:
        raise ApiError(400, "the prompt is empty: it has 0 tokens", param="prompt", code="invalid_value")
    if prompt_tokens + (max_tokens or 1) <= context:
        return max_tokens or context - prompt_tokens
    asked = f"max_tokens={max_tokens}" if max_tokens else "at least 1 token of answer"
    raise ApiError(
        400,
        f"the prompt has {prompt_tokens} tokens; together with {asked} that is "
        f"{prompt_tokens + (max_tokens or 1)}, but the model's context holds {context} tokens",
        param="max_tokens",
        code="context_length_exceeded",
    )
