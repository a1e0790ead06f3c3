"""Codec "bf16": bfloat16, 2 bytes an element. Lossless where the compute dtype is bfloat16 itself."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from hat_runtime.wire.dtypes import from_bfloat16, to_bfloat16
from hat_runtime.wire.row_codec import Bytes, FieldCodec, as_bytes, as_numbers


class Bf16(FieldCodec):
    """Relative error at most 2^-9 an element."""

    name = "bf16"

    def row_bytes(self, hidden_size: int, dtype: torch.dtype) -> int:
        """See RowCodec."""
        return 2 * hidden_size

    def _pack(self, values: NDArray[np.float32], rows: Bytes) -> None:
        rows[:] = as_bytes(to_bfloat16(values))

    def _unpack(self, rows: Bytes, hidden_size: int) -> NDArray[np.float32]:
        return from_bfloat16(as_numbers(rows, "<u2").astype(np.uint16))
