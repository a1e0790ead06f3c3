"""What a serving process sets up for itself before it serves."""

from __future__ import annotations

import gc
import os

OPENMP_SPINS = "30000"
"""How long torch's idle threads spin for the next parallel region: long enough within a pass, short enough that device
and cloud on one machine do not take the cores from each other (docs/decisions/0006-one-torch-thread.md)."""
GRPC_EXPERIMENTS = "tcp_rcv_lowat,tcp_frame_size_tuning"
"""gRPC wakes up for a large part of a message, not for each packet (docs/decisions/0008-few-wake-ups.md)."""

ONEDNN_PRIMITIVES = "128"
"""Kernels that torch's oneDNN keeps, each for one number of rows: passes have any, and with its 1,024 a cloud's memory
grows for hours. To make one again costs nothing that could be measured (docs/decisions/0021-hardening.md)."""


def tune_libraries() -> None:
    """Set what torch and gRPC read from the environment when they are imported; what is set already stays."""
    os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPINS)
    os.environ.setdefault("GRPC_EXPERIMENTS", GRPC_EXPERIMENTS)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", ONEDNN_PRIMITIVES)


def spare_collector() -> None:
    """Take everything that is alive out of the garbage collector's sight. Once, when the model is loaded.

    torch and transformers leave some hundred thousand objects that stay for good; a full collection of them stops all
    threads of the process for some tenths of a second, in the middle of somebody's answer.
    """
    gc.collect()
    gc.freeze()
