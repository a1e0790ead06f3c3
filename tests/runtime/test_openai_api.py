"""The device's API as the official OpenAI client sees it, over a real cloud."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from openai import BadRequestError, NotFoundError
from openai.types import CompletionUsage
from transformers import AutoModelForCausalLM, AutoTokenizer

from hat_runtime.log import request_id
from tests.runtime.api_pair import MODEL, Pair, metric, serving_pair
from tests.tiny_chat import make_tiny_chat_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

MESSAGES: list[Any] = [{"role": "user", "content": "The quick brown fox"}]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(folder: Path) -> AsyncIterator[Pair]:
    async with serving_pair(folder) as running:
        yield running
        await running.all_free()


def reference(folder: Path, ids: list[int], new_tokens: int) -> tuple[list[int], str]:
    """What the whole model in transformers says: greedy ids, and their text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor([ids])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new_tokens
    )
    new = out[0, len(ids) :].tolist()
    return new, tokenizer.decode(new, skip_special_tokens=True)


def hat(usage: CompletionUsage | None) -> dict[str, Any]:
    assert usage is not None
    return usage.hat  # type: ignore[attr-defined,no-any-return]


async def test_chat_says_what_the_whole_model_says(pair: Pair, folder: Path) -> None:
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    new, text = reference(folder, ids, 24)
    reply = await pair.openai.chat.completions.create(messages=MESSAGES, **GREEDY)
    choice = reply.choices[0]
    assert choice.message.content == text.rstrip("\ufffd")
    assert choice.message.role == "assistant"
    assert choice.finish_reason == ("length" if len(new) == 24 else "stop")
    assert (reply.object, reply.model) == ("chat.completion", MODEL)
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), len(new))
    assert reply.usage.total_tokens == len(ids) + len(new)


async def test_a_stream_joins_to_the_whole_reply(pair: Pair) -> None:
    whole = await pair.openai.chat.completions.create(messages=MESSAGES, **GREEDY)
    stream = await pair.openai.chat.completions.create(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    *texts, last, usage = chunks
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in texts) == whole.choices[0].message.content
    )
    assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in texts)
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert usage.choices == []
    assert usage.usage is not None
    assert whole.usage is not None
    assert usage.usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(texts) > 5  # it did come in pieces


async def test_the_wire_format_of_a_stream(pair: Pair) -> None:
    body = GREEDY | {"messages": MESSAGES, "stream": True}
    reply = await pair.http.post("/v1/chat/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = reply.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    objects = [json.loads(event.removeprefix("data: ")) for event in events]
    assert objects[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert objects[-1]["choices"][0]["delta"] == {}
    assert all("usage" not in item for item in objects)  # only where it was asked for


async def test_completions_take_text_texts_ids_and_lists_of_ids(pair: Pair, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["The quick", "one two three"]
    ids: list[list[int]] = [tokenizer(text)["input_ids"] for text in texts]
    want = [reference(folder, prompt, 24)[1].rstrip("\ufffd") for prompt in ids]
    create = pair.openai.completions.create
    for prompt in (texts, ids):
        reply = await create(prompt=prompt, **GREEDY)  # type: ignore[arg-type]
        assert [choice.text for choice in reply.choices] == want
        assert [choice.index for choice in reply.choices] == [0, 1]
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == sum(map(len, ids))
    for single in (texts[0], ids[0]):
        assert (await create(prompt=single, **GREEDY)).choices[0].text == want[0]  # type: ignore[arg-type]
    streamed = ["", ""]
    async for chunk in await create(prompt=texts, stream=True, **GREEDY):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == want


async def test_stop_strings_end_the_answer_before_them(pair: Pair) -> None:
    whole = (
        (await pair.openai.chat.completions.create(messages=MESSAGES, **GREEDY)).choices[0].message.content
    )
    assert whole is not None
    middle = len(whole) // 2
    for stop in (whole[middle : middle + 4], ["never there", whole[middle : middle + 7]]):
        last = stop if isinstance(stop, str) else stop[-1]
        want = whole[: whole.index(last)]
        reply = await pair.openai.chat.completions.create(messages=MESSAGES, stop=stop, **GREEDY)
        assert reply.choices[0].message.content == want
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage is not None
        assert reply.usage.completion_tokens < 24  # the rest was not generated
        stream = await pair.openai.chat.completions.create(
            messages=MESSAGES, stop=stop, stream=True, **GREEDY
        )
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(pieces) == want


async def test_a_seed_gives_the_same_text_again_at_any_chunk_size(pair: Pair) -> None:
    async def ask(**fields: Any) -> str | None:
        reply = await pair.openai.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=16, **fields
        )
        return reply.choices[0].message.content

    seeded = await ask(seed=7)
    for chunk in (1, 5, 0):
        assert await ask(seed=7, extra_body={"hat_chunk_tokens": chunk}) == seeded
    assert await ask(seed=8) != seeded
    assert (
        await ask() != await ask()
    )  # the default temperature is 1, and the default seed is another each time
    assert await ask(seed=7, top_p=1e-9) == await ask(temperature=0)


async def test_usage_tells_what_went_over_the_link(pair: Pair) -> None:
    ask = pair.openai.chat.completions.create
    reply = await ask(messages=[{"role": "user", "content": "x" * 100}], **(GREEDY | {"max_tokens": 4}))
    figures = hat(reply.usage)
    assert reply.usage is not None
    sent = reply.usage.prompt_tokens + 3
    assert sent * 64 * 4 < figures["uplink_bytes"] < sent * 64 * 4 * 1.5  # width 64 in float32
    assert 4 * 64 * 4 < figures["downlink_bytes"] < sent * 64 * 4
    assert figures["rounds"] == 4
    assert figures["chunk_tokens"] == 128
    assert figures["ttft_s"] > 0
    assert figures["tbt_s"] > 0
    assert figures["cloud_compute_s"] > 0
    assert figures["cloud_queue_s"] >= 0


async def test_the_next_turn_sends_only_its_new_tokens(pair: Pair) -> None:
    history: list[Any] = [{"role": "user", "content": "one two three four five six seven " * 4}]
    first = await pair.openai.chat.completions.create(messages=history, **GREEDY)
    history += [first.choices[0].message, {"role": "user", "content": "ten"}]
    second = await pair.openai.chat.completions.create(messages=history, **GREEDY)
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert cached >= first.usage.prompt_tokens - 1
    fresh = second.usage.prompt_tokens - cached + second.usage.completion_tokens
    assert hat(second.usage)["uplink_bytes"] < fresh * 64 * 4 * 1.5


async def test_without_max_tokens_the_answer_goes_to_the_end_of_the_context(pair: Pair) -> None:
    reply = await pair.openai.completions.create(model=MODEL, prompt=[5] * 500, temperature=0, seed=1)  # type: ignore[arg-type]
    assert reply.usage is not None
    ended = reply.choices[0].finish_reason
    assert reply.usage.total_tokens == 512 if ended == "length" else reply.usage.total_tokens <= 512


async def test_models(pair: Pair) -> None:
    listed = await pair.openai.models.list()
    assert [model.id for model in listed.data] == [MODEL]
    assert (await pair.openai.models.retrieve(MODEL)).object == "model"
    with pytest.raises(NotFoundError, match=r"other.*tiny"):
        await pair.openai.models.retrieve("other")


async def test_beyond_the_context_is_refused_with_both_numbers(pair: Pair) -> None:
    with pytest.raises(BadRequestError) as caught:
        await pair.openai.completions.create(model=MODEL, prompt=[5] * 400, max_tokens=200)  # type: ignore[arg-type]
    assert "400" in str(caught.value)
    assert "200" in str(caught.value)
    assert "512" in str(caught.value)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")
    with pytest.raises(BadRequestError, match=r"600.*512"):
        await pair.openai.completions.create(model=MODEL, prompt=[5] * 600)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"extra_body": {"top_k": 4}}, "top_k"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
        ),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(
    pair: Pair, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(BadRequestError) as caught:
        await pair.openai.chat.completions.create(**(GREEDY | {"messages": MESSAGES} | fields))
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


async def test_token_ids_outside_the_vocabulary_are_refused(pair: Pair) -> None:
    for token in (-1, 10**6):
        with pytest.raises(BadRequestError, match=str(token)):
            await pair.openai.completions.create(prompt=[1, token], **GREEDY)  # type: ignore[arg-type]


async def test_a_wrong_model_is_not_found_and_the_right_one_named(pair: Pair) -> None:
    with pytest.raises(NotFoundError, match=r"gpt-4o.*tiny") as caught:
        await pair.openai.chat.completions.create(messages=MESSAGES, **(GREEDY | {"model": "gpt-4o"}))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", b"{not json", 400),
        ("POST", "/v1/chat/completions", b"", 400),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400),
        ("POST", "/v1/chat/completions", b"\xff\xfe", 400),
        ("POST", "/v1/completions", b'{"model": "tiny", "prompt": "\\ud800"}', 400),
        ("POST", "/v1/completions", b'{"model": "tiny", "prompt": ""}', 200),  # the BOS token alone
        ("POST", "/v1/completions", b'{"model": "tiny", "prompt": [[]]}', 400),
        ("POST", "/v1/embeddings", b"{}", 404),
        ("GET", "/v1/chat/completions", b"", 405),
    ],
)
async def test_every_error_has_openais_form(
    pair: Pair, method: str, path: str, body: bytes, status: int
) -> None:
    reply = await pair.http.request(method, path, content=body)
    assert reply.status_code == status
    if status != 200:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code", "request_id"}


class _Lines(logging.Handler):
    """Log lines as (logger, request id, message)."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[tuple[str, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.name, request_id.get(), record.getMessage()))


async def test_the_request_id_is_the_same_everywhere(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    body = GREEDY | {"messages": MESSAGES, "max_tokens": 2}
    seen, logger = _Lines(), logging.getLogger("hat_runtime")
    logger.addHandler(seen)
    try:
        with caplog.at_level(logging.DEBUG, "hat_runtime"):
            reply = await pair.http.post(
                "/v1/chat/completions", json=body, headers={"X-Request-ID": "my.id-1"}
            )
    finally:
        logger.removeHandler(seen)
    assert reply.headers["x-request-id"] == "my.id-1"
    (access,) = [text for name, id_, text in seen.lines if name == "hat_runtime.access" and id_ == "my.id-1"]
    assert "status=200" in access
    assert "completion_tokens=2" in access
    assert any(name.startswith("hat_runtime.cloud") and id_ == "my.id-1" for name, id_, _ in seen.lines)
    assert all("quick brown" not in text for _, _, text in seen.lines)
    for bad in ("x" * 129, "a b", "ü".encode()):
        reply = await pair.http.post("/v1/chat/completions", json={}, headers={"X-Request-ID": bad})
        assert reply.status_code == 400
        made = reply.headers["x-request-id"]
        assert len(made) == 32
        assert reply.json()["error"]["request_id"] == made


async def test_health_readiness_and_metrics(pair: Pair) -> None:
    assert (await pair.http.get("/healthz")).status_code == 200
    assert (await pair.http.get("/readyz")).text == "ready\n"
    tokens = metric(pair, "hat_generation_tokens_total")
    await pair.openai.chat.completions.create(messages=MESSAGES, **(GREEDY | {"max_tokens": 3}))
    text = (await pair.http.get("/metrics")).text
    assert metric(pair, "hat_generation_tokens_total") == tokens + 3
    assert 'hat_http_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert "hat_time_to_first_token_seconds_bucket" in text
