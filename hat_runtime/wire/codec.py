"""How hidden states become payload bytes.

The codec is part of the handshake (`Open.codec`). Codec "raw" sends the session's compute dtype as it is, little
endian, row after row: lossless.
"""

from __future__ import annotations

import torch

RAW = "raw"
CODECS = (RAW,)

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Compute dtypes by their name on the wire and on the command line."""


def dtype_name(dtype: torch.dtype) -> str:
    """The wire's name of a torch dtype. Raises ValueError for one that has none."""
    for name, candidate in DTYPES.items():
        if candidate == dtype:
            return name
    raise ValueError(f"dtype {dtype} has no name on the wire; use one of {', '.join(DTYPES)}")


def row_bytes(hidden_size: int, dtype: torch.dtype) -> int:
    """Bytes of one hidden state on the wire: `hidden_size` elements of `dtype`."""
    return hidden_size * dtype.itemsize


def encode(hidden: torch.Tensor) -> bytes:
    """Hidden states [n, hidden_size] of any dtype and device -> n * row_bytes bytes."""
    rows = hidden.detach().to("cpu").contiguous()
    return rows.view(torch.uint8).numpy().tobytes()


def decode(payload: bytes | bytearray, n: int, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Payload bytes -> hidden states [n, hidden_size] of `dtype` on the CPU.

    A bytearray is used as it is, without a copy; bytes are copied once.

    Raises:
        ValueError: the payload has not exactly n rows of hidden_size elements.
    """
    want = n * row_bytes(hidden_size, dtype)
    if len(payload) != want:
        raise ValueError(
            f"payload has {len(payload)} bytes, but n={n} rows of {hidden_size} x {dtype_name(dtype)} are {want} bytes"
        )
    if n == 0:
        return torch.empty(0, hidden_size, dtype=dtype)
    writable = payload if isinstance(payload, bytearray) else bytearray(payload)
    return torch.frombuffer(writable, dtype=dtype).view(n, hidden_size)
