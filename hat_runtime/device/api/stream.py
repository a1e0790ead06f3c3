"""Server-sent events: an answer while it is being generated."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hat_runtime.device.api.answers import Answers, Piece
from hat_runtime.device.api.errors import CLIENT_GONE, from_exception
from hat_runtime.device.api.replies import Reply, usage

KEEP_ALIVE_S = 10.0
"""Silence after which a comment is sent: proxies and clients give up on a quiet connection, and a long prompt over a
slow link is quiet for long."""

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """A streamed reply, whose answers are freed however it ends.

    Args:
        answers: being generated; closed by this response.
        pieces: of `answers`, with None for every silence of KEEP_ALIVE_S.
        first: what came before the reply began, None for a silence.
        reply: the form of the reply.
        include_usage: end with a chunk that has no choices, but the usage.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        answers: Answers,
        pieces: AsyncGenerator[Piece | None, None],
        first: Piece | None,
        reply: Reply,
        *,
        include_usage: bool,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **reply.headers})
        del self.headers["content-length"]
        self._answers = answers
        self._pieces = pieces
        self._first = first
        self._reply = reply
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything. An error in the middle becomes an event, after which the stream ends."""
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            async for event in self._events(scope):
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._pieces.aclose()
            await self._answers.close()
            scope["hat.usage"] = usage(self._answers.stats())

    async def _events(self, scope: Scope) -> AsyncIterator[bytes]:
        for index in range(len(self._answers.requests)):
            if (opening := self._reply.opening(index)) is not None:
                yield self._chunk([opening])
        try:
            async for piece in self._from_first():
                if piece is None:
                    yield KEEP_ALIVE
                    continue
                tokens = piece.tokens
                if piece.text:
                    yield self._chunk(
                        [self._reply.marked(self._reply.piece(piece.index, piece.text, None), tokens)]
                    )
                    tokens = []
                if piece.finish_reason is not None:
                    last = self._reply.piece(piece.index, "", piece.finish_reason)
                    yield self._chunk([self._reply.marked(last, tokens)], last=True)
        except Exception as error:
            failure = from_exception(error)
            scope["hat.failed"] = failure.status
            if failure.status != CLIENT_GONE:
                yield _data(failure.body())
            return
        if self._include_usage:
            yield self._chunk([], usage(self._answers.stats()), last=True)
        yield DONE

    async def _from_first(self) -> AsyncIterator[Piece | None]:
        yield self._first
        async for piece in self._pieces:
            yield piece

    def _chunk(
        self, choices: list[dict[str, Any]], figures: dict[str, Any] | None = None, *, last: bool = False
    ) -> bytes:
        # As OpenAI does: with include_usage, every chunk has a usage, null in all but the last.
        return _data(
            self._reply.chunk(choices, last=last) | ({"usage": figures} if self._include_usage else {})
        )


def _data(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
