"""The device's HTTP API: OpenAI's chat and text completions, live figures, a page, health, readiness, metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from hat_runtime import __version__
from hat_runtime.device.api.answers import Answers, Piece, Served
from hat_runtime.device.api.errors import CLIENT_GONE, RETRY_S, ApiError, echo, from_exception
from hat_runtime.device.api.gate import Gate
from hat_runtime.device.api.live import stats_routes
from hat_runtime.device.api.middleware import RequestScope
from hat_runtime.device.api.page import page_routes
from hat_runtime.device.api.replies import ChatReply, Reply, TextReply, usage
from hat_runtime.device.api.schemas import AnswerOptions, ChatRequest, CompletionRequest, parse
from hat_runtime.device.api.stream import KEEP_ALIVE_S, EventStream
from hat_runtime.device.text import TokenText
from hat_runtime.errors import CloudUnavailable, HatError, UsageError
from hat_runtime.log import request_id
from hat_runtime.security.keys import KeyFile

MAX_BODY_BYTES = 8 * 1024 * 1024
"""Of a request: more than any context's worth of text."""


@dataclass
class Api:
    """What the endpoints work with. `served` is set once the model is loaded."""

    model_name: str
    registry: CollectorRegistry
    gate: Gate
    check_cloud: Callable[[], Awaitable[Any]]
    """Returns if the cloud is reachable, else raises a HatError that says why not."""
    keys: KeyFile | None = None
    """None: no key is asked for."""
    max_body_bytes: int = MAX_BODY_BYTES
    keep_alive_s: float = KEEP_ALIVE_S
    served: Served | None = None
    why_not_ready: str = "the device is starting"
    """While `served` is None."""
    created: int = 0
    """Unix time for /v1/models."""


def make_app(api: Api) -> ASGIApp:
    """The ASGI application."""
    app = FastAPI(title="HAT device", version=__version__)
    waiting = Gauge("hat_num_sessions_waiting", "Requests that wait for their turn.", registry=api.registry)
    waiting.set_function(lambda: api.gate.waiting)
    key = [Depends(_key_check(api))]
    app.include_router(_openai_routes(api), dependencies=key)
    app.include_router(stats_routes(api), dependencies=key)
    app.include_router(page_routes())
    app.include_router(_operations_routes(api))

    async def http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        failure = ApiError(error.status_code, str(error.detail), code=code)
        failure.headers.update(error.headers or {})
        return failure.response()

    async def failed(_: Request, error: Exception) -> Response:
        return from_exception(error).response()

    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ApiError, failed)
    app.add_exception_handler(HatError, failed)
    return RequestScope(app, api.registry)


def _key_check(api: Api) -> Callable[[Request], Awaitable[None]]:
    async def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if api.keys is not None and not api.keys.accepts(given):
            raise ApiError(
                401,
                "a valid API key is needed: send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )

    return check_key


def _openai_routes(api: Api) -> APIRouter:
    router = APIRouter(prefix="/v1")
    card = {"id": api.model_name, "object": "model", "created": api.created, "owned_by": "hat"}

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """The one model that is served here."""
        return {"object": "list", "data": [card]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """That model."""
        _check_model(api, name)
        return card

    @router.post("/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        body = parse(ChatRequest, await _json_body(request, api.max_body_bytes))
        _check_model(api, body.model)
        served = _served(api)
        try:
            # In a thread: a long prompt takes longer than other requests' events may wait.
            prompt = await asyncio.to_thread(served.encoder.encode_chat, body.conversation())
        except UsageError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from error
        return await _answer(
            api,
            request,
            [prompt],
            body.options(),
            ChatReply(api.model_name, served.fingerprint, body.hat_token_kinds),
        )

    @router.post("/completions", response_model=None)
    async def completions(request: Request) -> Response:
        """Continue a text or token ids."""
        body = parse(CompletionRequest, await _json_body(request, api.max_body_bytes))
        _check_model(api, body.model)
        served = _served(api)
        prompts = await asyncio.to_thread(_encode_prompts, served, body.prompt)
        return await _answer(
            api,
            request,
            prompts,
            body.options(),
            TextReply(api.model_name, served.fingerprint, body.hat_token_kinds),
        )

    return router


def _operations_routes(api: Api) -> APIRouter:
    router = APIRouter(default_response_class=PlainTextResponse)

    @router.get("/healthz")
    async def healthz() -> str:
        """The process works."""
        return "ok\n"

    @router.get("/readyz", response_model=None)
    async def readyz() -> Response:
        """Requests can be answered; if not, why not."""
        if api.gate.closed:
            return PlainTextResponse("the server is shutting down\n", 503)
        if api.served is None:
            return PlainTextResponse(f"{api.why_not_ready}\n", 503)
        try:
            await api.check_cloud()
        except HatError as error:
            if api.served.offline is not None and isinstance(error, CloudUnavailable):
                return PlainTextResponse(
                    f"ready, with the small model alone while the cloud is away: {error}\n"
                )
            return PlainTextResponse(f"{error}\n", 503)
        return PlainTextResponse("ready\n")

    @router.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(api.registry), media_type=CONTENT_TYPE_LATEST)

    return router


async def _answer(
    api: Api, request: Request, prompts: list[list[int]], options: AnswerOptions, reply: Reply
) -> Response:
    """Generate, and reply whole or as a stream. The status tells of every error before the first text."""
    served = _served(api)
    answers = await Answers.start(served, prompts, options, request_id.get(), api.gate, request.receive)
    try:
        pieces = answers.pieces(api.keep_alive_s)
        # An error that comes soon gets its own status; a long silence has to be filled with keep-alives instead.
        if options.stream:
            first = await anext(pieces)
            if first is None and not answers.settled:
                # Once more: what a silent way to the cloud costs until it is known to be one.
                first = await anext(pieces)
            answers.settle()
            form = reply.alone() if answers.offline else reply
            return EventStream(answers, pieces, first, form, include_usage=options.include_usage)
        body = await _whole(pieces, len(prompts), reply, answers)
    except BaseException:
        await answers.close()
        request.scope["hat.usage"] = usage(answers.stats())
        raise
    await answers.close()
    request.scope["hat.usage"] = body["usage"]
    return JSONResponse(body, headers=(reply.alone() if answers.offline else reply).headers)


async def _whole(
    pieces: AsyncGenerator[Piece | None, None], count: int, reply: Reply, answers: Answers
) -> dict[str, Any]:
    tokens: list[list[TokenText]] = [[] for _ in range(count)]
    reasons = [""] * count
    async for piece in pieces:
        if piece is not None:
            tokens[piece.index] += piece.tokens
            reasons[piece.index] = piece.finish_reason or ""
    form = reply.alone() if answers.offline else reply
    choices = []
    for index, parts in enumerate(tokens):
        text = "".join(part.text for part in parts)
        choices.append(form.marked(form.choice(index, text, reasons[index]), parts))
    return form.whole(choices, usage(answers.stats()))


async def _json_body(request: Request, limit: int) -> object:
    received = bytearray()
    try:
        async for part in request.stream():
            received += part
            if len(received) > limit:
                failure = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
                failure.headers["Connection"] = "close"  # the rest of the body is not read
                raise failure
    except ClientDisconnect:
        raise ApiError(CLIENT_GONE, "the client went away", code="client_gone") from None
    try:
        body = json.loads(received)
        if rb"\ud" in received.lower():  # half a surrogate pair is JSON, but no text
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, "the body holds half of a surrogate pair", code="invalid_json") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    return body


def _check_model(api: Api, name: str) -> None:
    if name != api.model_name:
        raise ApiError(
            404,
            f"there is no model {echo(name)} here; this device serves {echo(api.model_name)}",
            param="model",
            code="model_not_found",
        )


def _served(api: Api) -> Served:
    if api.served is None:
        raise ApiError(503, f"not ready: {api.why_not_ready}", code="not_ready", retry_after_s=RETRY_S)
    return api.served


def _encode_prompts(served: Served, prompts: list[str | list[int]]) -> list[list[int]]:
    encoded = []
    vocabulary = served.generator.model.vocab_size
    for prompt in prompts:
        ids = served.encoder.encode_text(prompt) if isinstance(prompt, str) else prompt
        wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise ApiError(
                400,
                f"prompt: token id {echo(wrong)} is not within the vocabulary, 0 to {vocabulary - 1}",
                param="prompt",
                code="invalid_value",
            )
        encoded.append(ids)
    return encoded
