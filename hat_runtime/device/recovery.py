"""What a device does when it loses the cloud: reach it again, and get the session back or another one."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from hat_runtime.device.link import KEEPALIVE_S
from hat_runtime.device.metrics import DeviceMetrics
from hat_runtime.device.refusals import SessionUnknown
from hat_runtime.device.session import CloudSession
from hat_runtime.errors import CloudUnavailable

log = logging.getLogger(__name__)

OPENING_FOR_S = 2.0
"""How long a request that has not reached the cloud yet tries to: its caller can ask again, and should know soon."""
_FIRST_PAUSE_S = 0.05  # for a moment gRPC opens streams on the connection that broke
_LONGEST_PAUSE_S = 1.0

CONNECTION, SESSION, DRAIN = "connection", "session", "drain"
"""Causes of a recovery: the connection was lost and the session was still there; the session was gone as well (another
replica, a cloud that started anew, too late); the replica went away and had said so."""


@dataclass(frozen=True)
class RecoveryConfig:
    """How persistent a device is."""

    reconnect_for_s: float = 30.0
    """Longest time to reach the cloud again; 0: the loss of a connection ends the answer."""
    max_recoveries: int = 16
    """Of one request; then it ends with an error."""
    keepalive_s: float = KEEPALIVE_S
    """From the last sign of life of a connection to a ping; half as long without an answer, and it is lost."""


class Recovery:
    """Replaces sessions of one kind of request."""

    def __init__(
        self, open_session: Callable[[CloudSession | None], CloudSession], metrics: DeviceMetrics
    ) -> None:
        """`open_session` opens a stream: for the lost session that it is given, or for a new one."""
        self._open = open_session
        self._metrics = metrics

    async def replace(
        self, lost: CloudSession, patience_s: float, *, anew: bool = True
    ) -> tuple[CloudSession, str]:
        """A session in place of one whose stream is lost, and why it was needed: CONNECTION, SESSION or DRAIN.

        Its `committed` says what of the text the cloud still holds.

        Args:
            lost: the session.
            patience_s: how long to try.
            anew: open a new session where the old one is gone.

        Raises:
            CloudUnavailable: not reached in time; the last try's error with the time in it.
            SessionUnknown: the session is gone, and `anew` is false.
            HatError: the cloud refuses for another reason.
        """
        began, pause_s = time.monotonic(), _FIRST_PAUSE_S
        resumes, cause = lost.may_resume, DRAIN if lost.draining else CONNECTION
        while True:
            if not resumes and not anew:
                raise SessionUnknown(f"the session is not kept by the cloud any more: {lost.error}")
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
            session: CloudSession | None = None
            try:
                session = self._open(lost if resumes else None)
                await session.opened()
            except SessionUnknown:
                resumes = False
            except CloudUnavailable as error:
                pause_s = min(max(2 * pause_s, error.retry_after_s or 0.0), _LONGEST_PAUSE_S)
                if time.monotonic() - began + pause_s > patience_s:
                    told = f"{error}; tried for {patience_s:g} s to go on with the answer"
                    raise type(error)(told, error.retry_after_s) from error
                resumes = resumes and lost.may_resume
            except BaseException:
                if session is not None:
                    session.close()
                raise
            else:
                if not resumes and cause == CONNECTION and lost.session_id:
                    cause = SESSION
                self._metrics.session_resumes.labels(cause).inc()
                log.info("back at the cloud (%s), which holds %d tokens", cause, session.committed)
                return session, cause
