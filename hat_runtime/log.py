"""Logging: text for people, JSON for machines, with the id of the request that a line belongs to.

No prompt, token id or hidden state is ever logged.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""The request that the current task works for; the same id on device and cloud."""


_SANE = re.compile(r"[A-Za-z0-9._-]+")


def sane_request_id(text: str) -> str | None:
    """The id if it may stand in a log and a header, else None: it comes from outside and must not forge log lines."""
    return _sane(text, 128)


def sane_device_name(text: str) -> str | None:
    """The name if it may stand in the list of devices, else None. Names of Kubernetes' nodes may."""
    return _sane(text, 253)


def _sane(text: str, longest: int) -> str | None:
    return text if len(text) <= longest and _SANE.fullmatch(text) else None


class _RequestIdFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "request_id"):
            record.request_id = request_id.get()
        return True


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": getattr(record, "request_id", "-"),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def setup(level: str = "info", style: str = "text") -> None:
    """Send all logging to standard error.

    Args:
        level: "debug", "info", "warning" or "error".
        style: "text" or "json" (one object a line).
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_RequestIdFilter())
    handler.setFormatter(
        _JsonFormatter()
        if style == "json"
        else logging.Formatter("%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("httpx", "urllib3", "filelock", "asyncio", "transformers", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def announce(text: str) -> None:
    """Print a server's line for whoever started it. A standard output that takes nothing is given up."""
    try:
        print(text, flush=True)
    except OSError as error:
        logging.getLogger(__name__).warning("standard output cannot be written: %s", error.strerror)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else it is tried again at the end
