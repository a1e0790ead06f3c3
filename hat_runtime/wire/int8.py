"""Codec "int8": a scale for each token, its outliers apart, 1 byte for every element."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from hat_runtime.wire.outliers import Outliers
from hat_runtime.wire.row_codec import Bytes, FieldCodec, as_bytes, as_numbers

_LARGEST = 127


@dataclass(frozen=True)
class Int8(FieldCodec):
    """Row: scale (float32), outliers, elements (int8, the outliers' are 0).

    An element is off by at most half a scale, which is the largest of the remaining magnitudes / 127.
    """

    outliers: Outliers = field(default_factory=Outliers)
    name = "int8"

    def row_bytes(self, hidden_size: int, dtype: torch.dtype) -> int:
        """See RowCodec."""
        return 4 + self.outliers.row_bytes(hidden_size) + hidden_size

    def _pack(self, values: NDArray[np.float32], rows: Bytes) -> None:
        body = 4 + self.outliers.row_bytes(values.shape[1])
        rest = self.outliers.take(values, rows[:, 4:body])
        scale = np.abs(rest).max(axis=1, keepdims=True) / np.float32(_LARGEST)
        rows[:, :4] = as_bytes(scale)
        scaled = np.rint(rest / np.where(scale == 0, np.float32(1), scale))
        # A scale among the smallest float32 is rounded coarsely, so the quotient may exceed the range.
        rows[:, body:] = np.clip(scaled, -_LARGEST, _LARGEST).astype(np.int8).view(np.uint8)

    def _unpack(self, rows: Bytes, hidden_size: int) -> NDArray[np.float32]:
        body = 4 + self.outliers.row_bytes(hidden_size)
        scale = as_numbers(rows[:, :4], "<f4")
        values: NDArray[np.float32] = as_numbers(rows[:, body:], "i1").astype(np.float32)
        values *= scale
        self.outliers.put_back(values, rows[:, 4:body])
        return values
