"""Progress of long work on standard error: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_LINE_EVERY_S = 5.0


class ProgressBar:
    """Called as progress(what, done, total); a new `what` starts a new bar. Use as a context manager."""

    def __init__(self) -> None:
        self._what: str | None = None
        self._bar: Any = None
        self._last_line = 0.0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` (bytes, if there are many) of `what` are done."""
        if sys.stderr.isatty():
            self._draw(what, done, total)
        else:
            self._print(what, done, total)

    def _draw(self, what: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if what != self._what:
            self._close()
            self._what = what
            as_bytes: dict[str, Any] = (
                {"unit": "B", "unit_scale": True, "unit_divisor": 1024} if total > 10_000 else {}
            )
            self._bar = tqdm(total=total, desc=what, file=sys.stderr, dynamic_ncols=True, **as_bytes)
        self._bar.update(done - self._bar.n)

    def _print(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what or done == total or now - self._last_line >= _LINE_EVERY_S:
            self._what, self._last_line = what, now
            print(f"{what}: {100 * done // max(total, 1)} %", file=sys.stderr, flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
