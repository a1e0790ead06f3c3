"""Codec "int4": a scale for each group of elements, the token's outliers apart, two elements a byte."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from hat_runtime.wire.dtypes import from_bfloat16, to_bfloat16
from hat_runtime.wire.outliers import Outliers
from hat_runtime.wire.row_codec import Bytes, FieldCodec, as_bytes, as_numbers

_LOWEST, _HIGHEST = -8, 7


@dataclass(frozen=True)
class Int4(FieldCodec):
    """Row: scales (bfloat16, one a group), outliers, elements (4 bits, the even one of a pair below, plus 8).

    The scale has the sign that maps the group's largest magnitude to -8, so that all 16 levels are used (as Q4_0 of
    ggml does). The last group may be shorter.
    """

    group: int = 64
    outliers: Outliers = field(default_factory=Outliers)
    name = "int4"

    def row_bytes(self, hidden_size: int, dtype: torch.dtype) -> int:
        """See RowCodec."""
        return self._body(hidden_size) + -(-hidden_size // 2)

    def _groups(self, hidden_size: int) -> int:
        return -(-hidden_size // self.group)

    def _body(self, hidden_size: int) -> int:
        """Where the elements begin."""
        return 2 * self._groups(hidden_size) + self.outliers.row_bytes(hidden_size)

    def _pack(self, values: NDArray[np.float32], rows: Bytes) -> None:
        n, hidden_size = values.shape
        groups, body = self._groups(hidden_size), self._body(hidden_size)
        rest = np.zeros((n, groups * self.group), np.float32)
        rest[:, :hidden_size] = self.outliers.take(values, rows[:, 2 * groups : body])
        grouped = rest.reshape(n, groups, self.group)
        # argmax takes the first NaN if there is one, so that the scale becomes NaN too.
        largest = np.take_along_axis(grouped, np.abs(grouped).argmax(axis=2)[:, :, None], axis=2)
        bits = to_bfloat16(largest / np.float32(_LOWEST))
        rows[:, : 2 * groups] = as_bytes(bits[:, :, 0])
        scale = from_bfloat16(bits)
        levels = np.rint(grouped / np.where(scale == 0, np.float32(1), scale))
        codes = (np.clip(levels, _LOWEST, _HIGHEST) - _LOWEST).astype(np.uint8).reshape(n, -1)
        codes = codes[:, : 2 * -(-hidden_size // 2)]
        rows[:, body:] = codes[:, 0::2] | (codes[:, 1::2] << 4)

    def _unpack(self, rows: Bytes, hidden_size: int) -> NDArray[np.float32]:
        n, groups, body = len(rows), self._groups(hidden_size), self._body(hidden_size)
        codes = np.zeros((n, groups * self.group), np.float32)
        pairs = rows[:, body:]
        width = 2 * pairs.shape[1]
        codes[:, 0:width:2] = pairs & 15
        codes[:, 1:width:2] = pairs >> 4
        codes += _LOWEST
        scale = from_bfloat16(as_numbers(rows[:, : 2 * groups], "<u2").astype(np.uint16))
        values = (codes.reshape(n, groups, self.group) * scale[:, :, None]).reshape(n, -1)[:, :hidden_size]
        values = np.ascontiguousarray(values)
        self.outliers.put_back(values, rows[:, 2 * groups : body])
        return values
