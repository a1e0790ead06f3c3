"""Sees that the engine has ended, or is stuck in a pass, so that the process ends and a new one takes its place."""

from __future__ import annotations

import asyncio
import time

from hat_runtime.cloud.engine import Engine

LIMIT_S = 60.0
_LOOKS_S = 0.5
"""Between two looks."""


class Watchdog:
    """For one engine. Its thread cannot be ended from outside: whoever is told must leave the process."""

    def __init__(self, engine: Engine, limit_s: float = LIMIT_S) -> None:
        """A pass that takes longer than `limit_s` seconds counts as stuck; 0: none does."""
        self._engine = engine
        self._limit_s = limit_s

    @property
    def stuck(self) -> bool:
        """A pass has taken too long and is not over."""
        began = self._engine.pass_began
        return 0 < self._limit_s < time.monotonic() - began if began is not None else False

    @property
    def reason(self) -> str | None:
        """Why the engine serves nobody, in words for people; None while it does."""
        if not self._engine.alive:
            return "the engine failed; see the cloud's log"
        if self.stuck:
            return f"a pass has taken more than {self._limit_s:g} s: the engine is stuck"
        return None

    async def wait(self) -> str:
        """Return the reason as soon as there is one."""
        while (reason := self.reason) is None:  # noqa: ASYNC110 (a time)
            await asyncio.sleep(min(_LOOKS_S, self._limit_s / 4 or _LOOKS_S))
        return reason
