"""GET /v1/hat/stats: how the device does now and did lately, in figures only; what the page and `hat top` show."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from hat_runtime import __version__
from hat_runtime.device.api.errors import ApiError, echo
from hat_runtime.device.generator import Generator
from hat_runtime.device.offline import DRAFT_ONLY, REFUSE
from hat_runtime.device.request import GenerationStats
from hat_runtime.device.token_steps import MODE
from hat_runtime.errors import HatError

if TYPE_CHECKING:
    from hat_runtime.device.api.app import Api

ASK_EVERY_S = 2.0
"""The cloud is asked no more often whether it is there, however many look."""
WAIT_S = 1.0
"""For its answer, where nothing newer is known than OLD_S; then the reply goes without."""
OLD_S = 10.0


class CloudWatch:
    """Whether the cloud answers, for many who ask often. For the event loop's thread.

    Args:
        check: returns if the cloud is reachable, else raises a HatError that says why not.
    """

    def __init__(self, check: Callable[[], Awaitable[Any]]) -> None:
        self._check = check
        self._asking: asyncio.Task[None] | None = None
        self._asked_s = -OLD_S
        self._ok: bool | None = None
        self._reason: str | None = None

    async def state(self) -> dict[str, Any]:
        """{"ok": whether it answered last (None: not known yet), "reason": why it did not}."""
        age_s = time.monotonic() - self._asked_s
        if self._asking is None and age_s >= ASK_EVERY_S:
            self._asking = asyncio.create_task(self._ask())
        if self._asking is not None and (self._ok is None or age_s >= OLD_S):
            await asyncio.wait((self._asking,), timeout=WAIT_S)
        return {"ok": self._ok, "reason": self._reason}

    async def _ask(self) -> None:
        try:
            await self._check()
            self._ok, self._reason = True, None
        except HatError as error:
            self._ok, self._reason = False, str(error)
        finally:
            self._asking, self._asked_s = None, time.monotonic()


def stats_routes(api: Api) -> APIRouter:
    """The endpoint."""
    router = APIRouter(prefix="/v1/hat")
    watch = CloudWatch(api.check_cloud)

    @router.get("/stats")
    async def stats(request: Request) -> dict[str, Any]:
        """Figures of link, drafting, sessions, and of the answers under way and the latest ones."""
        after = _number(request.query_params.get("after", "0"))
        served = api.served
        if served is None or api.gate.closed:
            reason = "the device is shutting down" if api.gate.closed else api.why_not_ready
            cloud: dict[str, Any] = {"address": None, "ok": False, "reason": reason}
            return _fixed(api) | {"cloud": cloud} | _session_counts(api, None)
        generator = served.generator
        cloud = {"address": generator.link.address} | await watch.state()
        offline = {"offline": REFUSE if served.offline is None else DRAFT_ONLY}
        return (
            _fixed(api)
            | offline
            | {"cloud": cloud}
            | _session_counts(api, generator)
            | figures(generator, after)
        )

    return router


def figures(generator: Generator, after: int = 0) -> dict[str, Any]:
    """What a device knows of its link, its drafts and its answers; null is what it does not know (yet).

    Args:
        generator: of the device.
        after: of the answers that have ended, only those with a higher number.
    """
    link, recent = generator.link, generator.recent
    latest, now = recent.latest(), time.monotonic()
    ended = [
        {"number": answer.number, "age_s": round(now - answer.ended_s, 3)}
        | answer_figures(answer.stats)
        | {"finish_reason": answer.stats.finish_reason}
        for answer in recent.after(after)
    ]
    return {
        "mode": generator.binding.mode or "hat",
        "drafting": generator.drafting,
        "uplink_bytes_per_s": round(link.estimate.uplink_bytes_per_s) or None,
        "rtt_s": round(link.estimate.rtt_s, 6) or None,
        "acceptance": round(link.acceptance.rate, 4) if link.acceptance.known else None,
        "chunk_tokens": None if latest is None or generator.binding.mode == MODE else latest.chunk_tokens,
        "tokens_per_round": recent.tokens_a_round(),
        "answers": recent.count,
        "running": [answer_figures(stats) for stats in recent.running],
        "recent": ended,
    }


def answer_figures(stats: GenerationStats) -> dict[str, Any]:
    """Of one answer, as far as it has come; names as in `usage.hat`."""
    count = stats.completion_tokens
    predicted = stats.predicted_ttft_s
    return {
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "completion_tokens": count,
        "ttft_s": round(stats.ttft_s, 6) if count else None,
        "predicted_ttft_s": None if predicted is None else round(predicted, 6),
        "tbt_s": round(stats.tbt_s, 6) if count > 1 else None,
        "rounds": stats.rounds,
        "draft_tokens": stats.draft_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "alternatives_accepted": stats.alternatives_accepted,
        "refusals": stats.refusals,
        "offline": stats.offline,
        "chunk_tokens": stats.chunk_tokens,
    }


def _fixed(api: Api) -> dict[str, Any]:
    return {"model": api.model_name, "version": __version__, "started": api.created}


def _session_counts(api: Api, generator: Generator | None) -> dict[str, Any]:
    idle = 0 if generator is None else len(generator.conversations)
    return {"sessions": {"running": api.gate.running, "waiting": api.gate.waiting, "idle": idle}}


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise ApiError(
            400,
            f"after={echo(text)}: must be the number of an answer, 0 or more",
            param="after",
            code="invalid_value",
        )
    return int(text)
