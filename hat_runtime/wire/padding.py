"""Frames of fixed sizes, so that their sizes say nothing of what is in them (`--pad-frames`).

A frame that is short of its size is filled with zeros in its field `padding`. What still shows: how many rounds there
are and when, and how many fixed units a prompt has (docs/benchmarks/padding.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hat_runtime.proto.hat.v1 import runtime_pb2 as pb

OVERHEAD_BYTES = 256
"""Room for all fields of a padded frame but its payload and its alternatives."""
BYTES_PER_ALTERNATIVE = 3
"""A position below 2**21."""
MAX_PADDING_BYTES = 1024 * 1024 - 1024
"""Of one frame; what else is in it fits under gRPC's limit of a message."""


@dataclass(frozen=True)
class Padding:
    """What a device pads its frames, and has the cloud pad its own, to."""

    round_rows: int
    """Rows of a round, its drafts and all their alternatives: those with fewer are filled up to a multiple of it."""
    prompt_rows: int
    """The same for the Steps of prompts."""

    def __post_init__(self) -> None:
        if self.round_rows < 1 or self.prompt_rows < 1:
            raise ValueError(f"{self}: both must be 1 or more")

    def rows(self, rows: int, of_round: bool) -> int:
        """Rows that a Step with so many appears to have."""
        return padded_rows(rows, self.round_rows if of_round else self.prompt_rows)


def padded_rows(rows: int, unit: int) -> int:
    """The least multiple of `unit`, not 0, that has room for `rows`."""
    return max(1, -(-rows // unit)) * unit


def frame_bytes(payload_bytes: int, alternatives: int = 0) -> int:
    """Size of a padded frame that appears to hold so much payload."""
    return payload_bytes + OVERHEAD_BYTES + BYTES_PER_ALTERNATIVE * alternatives


def split_padded(payload: bytes, whole: int, max_bytes: int) -> Iterator[tuple[bytes, bool, int]]:
    """Cut a payload as if it had `whole` bytes, at least 1 and no fewer than it has.

    Yields:
        (part, more, bytes that the part appears to have); the parts at the end may be empty.
    """
    for start in range(0, whole, max_bytes):
        end = min(start + max_bytes, whole)
        yield payload[start:end], end < whole, end - start


def fill(frame: pb.Step | pb.Result, size: int) -> None:
    """Set the frame's padding so that it is serialised to `size` bytes; a frame that is larger stays as it is.

    Protobuf writes a field's length in as few bytes as it takes, and an empty field not at all, so that a few sizes
    cannot be met: such a frame is one byte short, or two.
    """
    missing = size - frame.ByteSize() - 2  # the field's tag and at least one byte of length
    if missing < 1:
        return
    frame.padding = bytes(missing)
    excess = frame.ByteSize() - size
    if excess > 0:
        frame.padding = bytes(missing - excess)
