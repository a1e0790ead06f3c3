"""What the API accepts and how it refuses the rest."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hat_runtime.device.api.errors import ApiError
from hat_runtime.device.api.schemas import ChatRequest, CompletionRequest, parse

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "Hi"}


def refusal(body: object, kind: type[ChatRequest] | type[CompletionRequest] = ChatRequest) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(kind, body)
    assert caught.value.status == 400
    return caught.value


def test_defaults_are_those_of_openai() -> None:
    options = parse(ChatRequest, CHAT).options()
    assert (options.sampling.temperature, options.sampling.top_p) == (1.0, 1.0)
    assert (options.max_tokens, options.stop, options.stream, options.chunk_tokens) == (None, (), False, None)
    assert (
        options.sampling.seed != parse(ChatRequest, CHAT).options().sampling.seed
    )  # unseeded answers differ


def test_values_arrive() -> None:
    body = CHAT | {
        "max_completion_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        "seed": -3,
        "stop": "END",
        "stream": True,
        "stream_options": {"include_usage": True},
        "hat_chunk_tokens": 0,
    }
    options = parse(ChatRequest, body).options()
    assert (options.sampling.temperature, options.sampling.top_p, options.sampling.seed) == (0.0, 0.5, -3)
    assert (options.max_tokens, options.stop, options.chunk_tokens) == (7, ("END",), 0)
    assert (options.stream, options.include_usage) == (True, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("n", True),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "auto"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("logprobs", True),
        ("top_logprobs", 2),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("logit_bias", {"50256": -100}),
        ("audio", {"voice": "alloy"}),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content", "content": "x"}),
        ("reasoning_effort", "low"),
        ("store", True),
        ("service_tier", "flex"),
    ],
)
def test_unsupported_parameters_are_named(name: str, value: object) -> None:
    error = refusal(CHAT | {name: value})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert name in error.message


@pytest.mark.parametrize(
    ("name", "value"), [("best_of", 2), ("echo", True), ("suffix", "x"), ("logprobs", 0), ("n", 3)]
)
def test_unsupported_parameters_of_completions_are_named(name: str, value: object) -> None:
    assert refusal(TEXT | {name: value}, CompletionRequest).param == name


def test_all_unsupported_or_unknown_parameters_are_named_at_once() -> None:
    error = refusal(CHAT | {"logprobs": True, "n": 4})
    assert "logprobs=true" in error.message
    assert "n=4" in error.message
    error = refusal(CHAT | {"top_k": 5, "min_p": 0.1})
    assert "top_k" in error.message
    assert "min_p" in error.message
    assert (error.param, error.code) == ("top_k", "unknown_parameter")


def test_defaults_that_clients_send_and_their_own_labels_are_fine() -> None:
    parse(
        ChatRequest,
        CHAT
        | {
            "n": 1,
            "presence_penalty": 0,
            "frequency_penalty": 0.0,
            "logit_bias": {},
            "logprobs": False,
            "response_format": {"type": "text"},
            "tools": None,
            "tool_choice": "none",
            "stop": None,
            "stream_options": None,
            "user": "me",
            "metadata": {"a": "b"},
            "store": False,
            "service_tier": "auto",
            "parallel_tool_calls": True,
        },
    )
    parse(CompletionRequest, TEXT | {"best_of": 1, "echo": False, "suffix": None, "logprobs": None, "n": 1})


@pytest.mark.parametrize(
    ("name", "value", "echoed"),
    [
        ("temperature", 2.5, "2.5"),
        ("temperature", "hot", '"hot"'),
        ("temperature", float("nan"), "NaN"),
        ("top_p", 0, "0"),
        ("top_p", 1.5, "1.5"),
        ("max_tokens", 0, "0"),
        ("max_tokens", 1.5, "1.5"),
        ("max_tokens", True, "true"),
        ("max_completion_tokens", -4, "-4"),
        ("seed", "x", '"x"'),
        ("seed", 2**70, str(2**70)),
        ("stop", ["a", "b", "c", "d", "e"], '["a", "b", "c", "d", "e"]'),
        ("stop", "", '""'),
        ("stop", [1], "[1]"),
        ("stream", "yes", '"yes"'),
        ("hat_chunk_tokens", -1, "-1"),
        ("messages", [], "[]"),
        ("messages", "Hi", '"Hi"'),
    ],
)
def test_wrong_values_are_named_and_echoed(name: str, value: object, echoed: str) -> None:
    error = refusal(CHAT | {name: value})
    assert (error.param, error.code) == (name, "invalid_value")
    assert name in error.message
    assert echoed in error.message


def test_missing_fields_are_named() -> None:
    assert refusal({"model": "m"}).param == "messages"
    assert refusal({"messages": CHAT["messages"]}).param == "model"
    assert refusal({"model": "m"}, CompletionRequest).param == "prompt"
    assert refusal([1, 2]).code == "invalid_json"


def test_contradictions_are_refused() -> None:
    assert refusal(CHAT | {"stream_options": {"include_usage": True}}).param == "stream_options"
    error = refusal(CHAT | {"max_tokens": 3, "max_completion_tokens": 4})
    assert "max_tokens=3" in error.message
    assert "max_completion_tokens=4" in error.message


def test_message_contents() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "Ada"},
        {"role": "assistant", "content": "ok", "tool_calls": None, "refusal": None, "annotations": []},
    ]
    assert parse(ChatRequest, CHAT | {"messages": messages}).conversation() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one\ntwo", "name": "Ada"},
        {"role": "assistant", "content": "ok"},
    ]


@pytest.mark.parametrize(
    ("message", "where", "named"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "content",
            "image_url",
        ),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "content", "input_audio"),
        ({"role": "user", "content": [{"type": "text"}]}, "content", "no text"),
        ({"role": "user", "content": 5}, "content", "5"),
        ({"role": "tool", "content": "x"}, "role", "tool"),
        ({"role": "assistant", "content": None}, "content", "null"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "tool_calls", "not supported"),
        ({"content": "x"}, "role", "missing"),
    ],
)
def test_wrong_messages_are_named_by_their_place(message: dict[str, Any], where: str, named: str) -> None:
    error = refusal(CHAT | {"messages": [CHAT["messages"][0], message]})
    assert error.param == f"messages[1].{where}"
    assert named in error.message
    error.response()  # can be sent, whatever the value was


def test_prompts_of_completions() -> None:
    for prompt, parsed in [
        ("Hi", ["Hi"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ]:
        assert parse(CompletionRequest, TEXT | {"prompt": prompt}).prompt == parsed
    for wrong in (5, [], [1, "a"], [True], [[1, "a"]], {"a": 1}, ["x"] * 129):
        assert refusal(TEXT | {"prompt": wrong}, CompletionRequest).param == "prompt"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(body=st.dictionaries(st.sampled_from([*CHAT, "prompt", "stop", "stream_options", "seed", "n"]), JSON))
def test_any_json_is_accepted_or_refused_with_an_error_that_can_be_sent(body: dict[str, Any]) -> None:
    for kind, base in ((ChatRequest, CHAT), (CompletionRequest, TEXT)):
        with contextlib.suppress(ApiError):
            parse(kind, base | body)
            continue
        assert refusal(base | body, kind).response().body
