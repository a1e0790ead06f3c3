"""How hidden states become payload bytes.

The codecs of the uplink are part of the handshake (`Open.codec`, `Open.decode_codec`). Results travel in "raw": the
session's compute dtype as it is, little endian, row after row, lossless. `row_bytes`, `encode` and `decode` of this
module are raw's.
"""

from __future__ import annotations

import torch

from hat_runtime.wire.bf16 import Bf16
from hat_runtime.wire.codec_choice import CODECS, RAW, RAW_ONLY, CodecChoice
from hat_runtime.wire.dtypes import DTYPES, dtype_name
from hat_runtime.wire.int4 import Int4
from hat_runtime.wire.int8 import Int8
from hat_runtime.wire.row_codec import RowCodec

__all__ = [
    "CODECS",
    "DTYPES",
    "RAW",
    "RAW_ONLY",
    "CodecChoice",
    "RowCodec",
    "codec_named",
    "decode",
    "dtype_name",
    "encode",
    "row_bytes",
]


class Raw(RowCodec):
    """Codec "raw": the compute dtype's bytes."""

    name = RAW

    def row_bytes(self, hidden_size: int, dtype: torch.dtype) -> int:
        """See RowCodec."""
        return hidden_size * dtype.itemsize

    def encode(self, hidden: torch.Tensor) -> bytes:
        """See RowCodec."""
        rows = hidden.detach().to("cpu").contiguous()
        return rows.view(torch.uint8).numpy().tobytes()

    def decode(
        self, payload: bytes | bytearray, n: int, hidden_size: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """See RowCodec. A bytearray is used as it is, without a copy; bytes are copied once."""
        self.check_size(payload, n, hidden_size, dtype)
        if n == 0:
            return torch.empty(0, hidden_size, dtype=dtype)
        writable = payload if isinstance(payload, bytearray) else bytearray(payload)
        return torch.frombuffer(writable, dtype=dtype).view(n, hidden_size)

    def describe(self, n: int, hidden_size: int, dtype: torch.dtype) -> str:
        """See RowCodec."""
        return f"n={n} rows of {hidden_size} x {dtype_name(dtype)}"


_RAW = Raw()
_BY_NAME: dict[str, RowCodec] = {codec.name: codec for codec in (_RAW, Bf16(), Int8(), Int4())}
assert tuple(_BY_NAME) == CODECS


def codec_named(name: str) -> RowCodec:
    """The codec of a name. Raises ValueError, which echoes the name and lists all, if there is none."""
    if name not in _BY_NAME:
        raise ValueError(f"codec {name!r} is none of {', '.join(CODECS)}")
    return _BY_NAME[name]


row_bytes, encode, decode = _RAW.row_bytes, _RAW.encode, _RAW.decode
