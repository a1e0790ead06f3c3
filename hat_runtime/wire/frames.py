"""Frames: the payload of a Step or Result, cut into gRPC messages of a bounded size.

A message is encoded once, so a large one blocks whatever shares the connection, and a server must bound what it
receives: 512 KiB a frame under a 1 MiB limit.
"""

from __future__ import annotations

from collections.abc import Iterator

MAX_FRAME_BYTES = 512 * 1024
"""Most payload bytes in one frame."""

MAX_MESSAGE_BYTES = 1024 * 1024
"""gRPC's receive limit on both sides."""

MAX_STEP_TOKENS = 2048
"""Most tokens in one Step."""


def split(payload: bytes, max_bytes: int = MAX_FRAME_BYTES) -> Iterator[tuple[bytes, bool]]:
    """Cut a payload into (part, more) pairs; an empty payload is one empty part."""
    if len(payload) <= max_bytes:
        yield payload, False
        return
    for start in range(0, len(payload), max_bytes):
        end = start + max_bytes
        yield payload[start:end], end < len(payload)
