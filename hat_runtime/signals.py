"""Ending a server cleanly."""

from __future__ import annotations

import asyncio
import signal


async def wait_for_termination() -> None:
    """Return when the process is asked to end by SIGTERM or SIGINT (Ctrl-C)."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    await asked.wait()
