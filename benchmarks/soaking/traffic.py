"""Clients that ask without a pause, and compare every answer with the right one."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from soaking.questions import LONGEST, Exam, Question

EXACT, CANCELLED, CUT, REFUSED, WRONG = "exact", "cancelled", "cut with an error", "refused", "WRONG"
CLEAR = (429, 503)
"""Statuses that a client may get while the cloud is away or the device is full."""
PAUSE_S = 0.1
"""After a refusal."""


@dataclass
class Tally:
    """How answers ended, by kind of request."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    tokens: int = 0
    """In answers and beginnings of answers that were compared."""
    problems: list[str] = field(default_factory=list)

    def note(self, kind: str, ending: str, problem: str = "") -> None:
        """One request has ended."""
        self.counts[kind, ending] += 1
        if ending == WRONG and len(self.problems) < 10:
            self.problems.append(f"{kind}: {problem}")


class Client:
    """Asks one device, one request at a time, while `open` is set."""

    def __init__(self, http: httpx.AsyncClient, exam: Exam, seed: int, tally: Tally) -> None:
        self.http, self.exam, self.tally = http, exam, tally
        self.open = asyncio.Event()
        self.resting = asyncio.Event()
        """No request of this client is under way."""
        self._rng = random.Random(seed)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.resting.set()
            await self.open.wait()
            self.resting.clear()
            question = self._rng.choice(self.exam.questions)
            most = self._rng.choice([1, 5, 20, LONGEST])
            ask = self._rng.choice([self._whole, self._stream, self._stream, self._cancel])
            try:
                await ask(question, most)
            except (httpx.HTTPError, TimeoutError) as error:
                self.tally.note(ask.__name__.strip("_"), WRONG, f"{type(error).__name__}: {error}")

    async def _whole(self, question: Question, most: int) -> None:
        kind = question.path.rsplit("/", 2)[-2] if "chat" in question.path else "completion"
        reply = await self.http.post(question.path, json=question.body | {"max_tokens": most})
        if reply.status_code != 200:
            await self._failed(kind, reply.status_code, reply.json())
            return
        choice = reply.json()["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        self._compare(kind, question, most, text, choice["finish_reason"])

    async def _stream(self, question: Question, most: int) -> None:
        await self._read("stream", question, most, lambda _: False)

    async def _cancel(self, question: Question, most: int) -> None:
        leave = self._rng.randint(1, 12)
        await self._read("cancel", question, most, lambda pieces: pieces >= leave)

    async def _read(self, kind: str, question: Question, most: int, leave: Callable[[int], bool]) -> None:
        """A stream to its end, or until this client goes away."""
        body = question.body | {"max_tokens": most, "stream": True}
        text, reason, pieces = "", None, 0
        async with self.http.stream("POST", question.path, json=body) as reply:
            if reply.status_code != 200:
                await self._failed(kind, reply.status_code, json.loads(await reply.aread()))
                return
            async for line in reply.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    self._cut(kind, question, most, text, event["error"])
                    return
                for choice in event["choices"]:
                    text += choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
                    reason = choice["finish_reason"] or reason
                pieces += 1
                if leave(pieces) and reason is None:
                    self._beginning(kind, CANCELLED, question, most, text)
                    return
        self._compare(kind, question, most, text, reason)

    def _compare(self, kind: str, question: Question, most: int, text: str, reason: str | None) -> None:
        right = self.exam.text(question, most)
        ends = "stop" if question.stopped and len(question.ids) < most else "length"
        if (text, reason) == (right, ends):
            self.tally.tokens += len(question.tokens(most))
            self.tally.note(kind, EXACT)
        else:
            self.tally.note(kind, WRONG, f"{question.body} {most}: {text!r} {reason}, not {right!r} {ends}")

    def _beginning(self, kind: str, ending: str, question: Question, most: int, text: str) -> None:
        right = self.exam.text(question, most)
        if right.startswith(text):
            self.tally.tokens += len(question.tokens(most)) * len(text) // max(1, len(right))
            self.tally.note(kind, ending)
        else:
            self.tally.note(kind, WRONG, f"{question.body} {most}: {text!r} is no beginning of {right!r}")

    def _cut(self, kind: str, question: Question, most: int, text: str, error: dict[str, Any]) -> None:
        if error.get("type") == "server_error" and error.get("code") != "internal" and error.get("message"):
            self._beginning(kind, CUT, question, most, text)
        else:
            self.tally.note(kind, WRONG, f"a stream ended with {error}")

    async def _failed(self, kind: str, status: int, body: dict[str, Any]) -> None:
        clear = status in CLEAR and bool(body.get("error", {}).get("message"))
        self.tally.note(kind, REFUSED if clear else WRONG, f"status {status}: {body}")
        await asyncio.sleep(PAUSE_S)
