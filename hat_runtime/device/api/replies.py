"""What the API sends: OpenAI's objects for chat and text completions, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from hat_runtime.device.request import GenerationStats
from hat_runtime.device.text import TokenText

OFFLINE_HEADER = "X-HAT-Offline"
OFFLINE_SUFFIX = "-offline-draft"


@dataclass(frozen=True)
class Reply(ABC):
    """The fixed part of one reply."""

    model: str
    fingerprint: str
    token_kinds: bool = False
    """Every choice has its tokens with their kinds beside the text."""
    offline: bool = False
    """The small model answers alone."""
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    prefix = ""
    whole_object = ""
    chunk_object = ""

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that mark the reply."""
        return {OFFLINE_HEADER: "draft-only"} if self.offline else {}

    def alone(self) -> Self:
        """The reply of the small model alone: it is another model, and says so."""
        name = f"{self.model}{OFFLINE_SUFFIX}"
        return replace(self, model=name, fingerprint=f"{self.fingerprint}_offline", offline=True)

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """The first choice of a stream, before any text; None where there is no such thing."""

    @abstractmethod
    def piece(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """A choice of a chunk."""

    @abstractmethod
    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """A choice of a whole reply."""

    def marked(self, choice: dict[str, Any], tokens: Sequence[TokenText]) -> dict[str, Any]:
        """The choice with the extension `hat`, where it was asked for and there is something to say."""
        if not self.token_kinds or not tokens:
            return choice
        return choice | {"hat": {"tokens": [{"text": token.text, "kind": token.kind} for token in tokens]}}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """A reply that is not streamed."""
        return self._object(self.whole_object) | {"choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], *, last: bool = False) -> dict[str, Any]:
        """One chunk of a stream; the last one of an answer says again where the cloud had no part in it."""
        found = self._object(self.chunk_object) | {"choices": choices}
        return found | {"hat": {"offline": True}} if last and self.offline else found

    def _object(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{self.identity}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class ChatReply(Reply):
    """POST /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        """The role comes before the first text."""
        return self._delta(index, {"role": "assistant", "content": ""}, None)

    def piece(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """More content, or an empty delta with the reason for the end."""
        return self._delta(index, {"content": text} if text else {}, finish_reason)

    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """The whole message."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}

    @staticmethod
    def _delta(index: int, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


class TextReply(Reply):
    """POST /v1/completions."""

    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def opening(self, index: int) -> dict[str, Any] | None:
        """Text has no role."""
        return None

    def piece(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """More text."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """All the text."""
        return self.piece(index, text, finish_reason)


def usage(all_stats: Sequence[GenerationStats]) -> dict[str, Any]:
    """OpenAI's usage object over the answers of a request, with the extension `hat`.

    `hat` sums bytes, rounds, guessed and accepted tokens and the cloud's seconds; ttft_s is the earliest first token,
    tbt_s the mean over all intervals between tokens (null where there are none).
    """
    prompt = sum(stats.prompt_tokens for stats in all_stats)
    completion = sum(stats.completion_tokens for stats in all_stats)
    first = [stats.ttft_s for stats in all_stats if stats.completion_tokens]
    intervals = [
        (stats.tbt_s, stats.completion_tokens - 1) for stats in all_stats if stats.completion_tokens > 1
    ]
    count = sum(n for _, n in intervals)
    predicted = [stats.predicted_ttft_s for stats in all_stats if stats.predicted_ttft_s is not None]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(stats.cached_tokens for stats in all_stats)},
        "hat": {
            "offline": any(stats.offline for stats in all_stats),
            "ttft_s": round(min(first), 6) if first else None,
            "tbt_s": round(sum(tbt * n for tbt, n in intervals) / count, 6) if count else None,
            "uplink_bytes": sum(stats.uplink_bytes for stats in all_stats),
            "downlink_bytes": sum(stats.downlink_bytes for stats in all_stats),
            "rounds": sum(stats.rounds for stats in all_stats),
            "resumes": sum(stats.resumes for stats in all_stats),
            "draft_tokens": sum(stats.draft_tokens for stats in all_stats),
            "accepted_tokens": sum(stats.accepted_tokens for stats in all_stats),
            "alternatives": sum(stats.alternatives for stats in all_stats),
            "alternatives_accepted": sum(stats.alternatives_accepted for stats in all_stats),
            "refusals": sum(stats.refusals for stats in all_stats),
            "predicted_ttft_s": None if not predicted else round(min(predicted), 6),
            "chunk_tokens": max((stats.chunk_tokens for stats in all_stats), default=0),
            "cloud_compute_s": round(sum(stats.cloud_compute_s for stats in all_stats), 6),
            "cloud_queue_s": round(sum(stats.cloud_queue_s for stats in all_stats), 6),
        },
    }
