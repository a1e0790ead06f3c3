"""How many answers are generated at once, and how many may wait for their turn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from hat_runtime.device.api.errors import RETRY_S, ApiError

log = logging.getLogger(__name__)

MAX_WAIT_S = 60.0


Abort = Callable[[ApiError], None]
"""Ends a request's work with an error."""


class Gate:
    """Turns for answers, first come first served, with a bounded queue in front.

    Args:
        max_concurrent: answers at once.
        max_waiting: requests that may wait; one more is refused at once.
        max_wait_s: a request that got no turn in this time is refused.
    """

    def __init__(self, max_concurrent: int, max_waiting: int, max_wait_s: float = MAX_WAIT_S) -> None:
        self.max_concurrent = max_concurrent
        self.max_waiting = max_waiting
        self.max_wait_s = max_wait_s
        self.waiting = 0
        self.running = 0
        self.closed = False
        self._aborts: set[Abort] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._turns = asyncio.Semaphore(max_concurrent)

    def come(self, abort: Abort) -> None:
        """A request is here, which `abort` would end."""
        self._aborts.add(abort)
        self._empty.clear()

    def go(self, abort: Abort) -> None:
        """Its work is done and freed."""
        self._aborts.discard(abort)
        if not self._aborts:
            self._empty.set()

    async def admit(self) -> None:
        """Wait for a request's first turn.

        Raises:
            ApiError: 429 where too many wait or it took too long; 503 where the server is shutting down.
        """
        if self.closed:
            raise _shutting_down()
        if self._turns.locked() and self.waiting >= self.max_waiting:
            raise ApiError(
                429,
                f"{self.running} answers are being generated (at most {self.max_concurrent} at once) and "
                f"{self.waiting} requests wait (at most {self.max_waiting}); try again later",
                code="overloaded",
                retry_after_s=RETRY_S,
            )
        try:
            async with asyncio.timeout(self.max_wait_s):
                await self.enter()
        except TimeoutError:
            raise ApiError(
                429,
                f"no turn in {self.max_wait_s:g} s, with {self.max_concurrent} answers generated at once; "
                "try again later",
                code="overloaded",
                retry_after_s=RETRY_S,
            ) from None

    async def enter(self) -> None:
        """Wait for a turn, however long: for the further answers of a request that was admitted."""
        self.waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self.waiting -= 1
        self.running += 1

    def leave(self) -> None:
        """Give the turn back."""
        self.running -= 1
        self._turns.release()

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests, give the others `grace_s` seconds to end, then end them with an error."""
        self.closed = True
        if self._aborts:
            log.info("%d requests get %g s to end", len(self._aborts), grace_s)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._empty.wait()
        finally:
            for abort in list(self._aborts):
                text = "the server shut down before the answer was complete"
                abort(ApiError(503, text, code="interrupted", retry_after_s=RETRY_S))
        await self._empty.wait()


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=RETRY_S)
