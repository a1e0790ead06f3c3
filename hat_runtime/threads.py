"""Where torch may run: at any time in one lasting thread of a process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


async def in_passing_thread(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Await function(*args, **kwargs) in a thread that ends with it. For whatever calls torch outside the engine.

    torch keeps an OpenMP team for every thread that has called it. As soon as the teams of a process have more threads
    than the machine has cores, GNU OpenMP no longer spins between parallel regions but sleeps, and a pass of a small
    model takes twice as long (docs/decisions/0006-one-torch-thread.md). The threads of asyncio.to_thread stay, and so
    do their teams; this one goes.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="hat-passing")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, partial(function, *args, **kwargs))
    finally:
        pool.shutdown(wait=False)
