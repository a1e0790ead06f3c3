"""A small streaming client of the device's API, with nothing but the standard library."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from hat_runtime.errors import HatError


@dataclass(frozen=True)
class Answer:
    """One answer."""

    text: str
    finish_reason: str
    ttft_s: float
    """From the request to the first text, seen by the client."""
    usage: dict[str, Any]
    """OpenAI's usage object, with the device's extension `hat`."""

    @property
    def figures(self) -> dict[str, Any]:
        """The device's own measurements: ttft_s, tbt_s, uplink_bytes, downlink_bytes, rounds, chunk_tokens, ..."""
        figures: dict[str, Any] = self.usage["hat"]
        return figures


def stream_chat(
    url: str,
    question: str,
    *,
    max_tokens: int,
    chunk_tokens: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Ask one question, greedily.

    Args:
        url: the device's base URL, without /v1.
        question: the user's message.
        max_tokens: of the answer.
        chunk_tokens: of a prompt chunk; 0 the whole prompt at once, None the device's default.
        on_text: gets each piece of text as it comes.

    Raises:
        HatError: the device refuses, or goes away.
    """
    message = {"role": "user", "content": question}
    return stream(url, "/v1/chat/completions", {"messages": [message]}, max_tokens, chunk_tokens, on_text)


def stream_completion(
    url: str, prompt: str | list[int], *, max_tokens: int, chunk_tokens: int | None = None
) -> Answer:
    """Continue a raw text, or its token ids, greedily; see stream_chat."""
    return stream(url, "/v1/completions", {"prompt": prompt}, max_tokens, chunk_tokens, None)


def whole_completion(
    url: str, prompt: list[int], *, max_tokens: int, chunk_tokens: int | None = None
) -> Answer:
    """Continue token ids greedily, and get the whole answer at once.

    Raises:
        HatError: the device refuses, or goes away.
    """
    body = {**_common(url, max_tokens, chunk_tokens), "prompt": prompt}
    start = time.monotonic()
    with _reply(url, "/v1/completions", body) as response:
        reply = response.read()
    answer = json.loads(reply)
    choice = answer["choices"][0]
    return Answer(choice["text"], choice["finish_reason"], time.monotonic() - start, answer["usage"])


def stream(
    url: str,
    path: str,
    body: dict[str, Any],
    max_tokens: int,
    chunk_tokens: int | None,
    on_text: Callable[[str], None] | None,
) -> Answer:
    """POST a request and read its event stream to the end."""
    body = {
        **_common(url, max_tokens, chunk_tokens),
        "stream": True,
        "stream_options": {"include_usage": True},
        **body,
    }
    pieces: list[str] = []
    usage: dict[str, Any] = {}
    reason = ""
    first = 0.0
    start = time.monotonic()
    with _reply(url, path, body) as response:
        for line in response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise HatError(f"the device stopped: {event['error'].get('message')}")
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                reason = choice.get("finish_reason") or reason
                text = choice.get("text") or choice.get("delta", {}).get("content") or ""
                if text:
                    first = first or time.monotonic()
                    pieces.append(text)
                    if on_text is not None:
                        on_text(text)
    if not usage:
        raise HatError("the device's answer broke off before its end")
    return Answer("".join(pieces), reason, (first or time.monotonic()) - start, usage)


def model_name(url: str) -> str:
    """The name of the model that the device serves."""
    with _reply(url, "/v1/models", failure=f"the device at {url} cannot be reached") as response:
        return str(json.loads(response.read())["data"][0]["id"])


def _common(url: str, max_tokens: int, chunk_tokens: int | None) -> dict[str, Any]:
    """The fields of every request for a greedy answer."""
    body = {"model": model_name(url), "max_tokens": max_tokens, "temperature": 0}
    return body if chunk_tokens is None else {**body, "hat_chunk_tokens": chunk_tokens}


@contextmanager
def _reply(
    url: str, path: str, body: dict[str, Any] | None = None, failure: str = "the device went away"
) -> Iterator[http.client.HTTPResponse]:
    """The response to a POST of `body`, or to a GET without one, while it is read.

    Raises:
        HatError: the device refuses, or the connection fails, also while the caller reads.
    """
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=300)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise HatError(f"the device refused: {_message(response.read())}")
        yield response
    except (OSError, http.client.HTTPException) as error:
        raise HatError(f"{failure}: {error}") from error
    finally:
        connection.close()


def _message(body: bytes) -> str:
    """What an error in OpenAI's format says."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:500].decode(errors="replace")
