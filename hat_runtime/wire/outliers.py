"""The largest values of each row, sent apart.

A few channels of a hidden state are hundreds of times larger than the others ("massive activations", arXiv 2402.17762;
"outlier features", LLM.int8(), arXiv 2208.07339), and which ones differs from token to token. Under one scale with
them all others would round to zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hat_runtime.wire.row_codec import Bytes, as_bytes, as_numbers

MAX_HIDDEN_SIZE = 1 << 16
_BYTES = 2 + 4


@dataclass(frozen=True)
class Outliers:
    """The `count` values of largest magnitude of each row: index as uint16, value as float32.

    Not float16, which ends at 65,504: massive activations can be larger.
    """

    count: int = 8

    def of(self, hidden_size: int) -> int:
        """How many there are in a row: at most an eighth of it. Raises ValueError if an index cannot hold the size."""
        if hidden_size > MAX_HIDDEN_SIZE:
            raise ValueError(
                f"hidden_size {hidden_size} is more than {MAX_HIDDEN_SIZE}; use codec raw or bf16"
            )
        return min(self.count, hidden_size // 8)

    def row_bytes(self, hidden_size: int) -> int:
        """Bytes of a row's outliers."""
        return _BYTES * self.of(hidden_size)

    def take(self, values: NDArray[np.float32], field: Bytes) -> NDArray[np.float32]:
        """Write the outliers of `values` [n, hidden_size] into `field`; the values with zeros in their place.

        NaN counts as larger than any number.
        """
        hidden_size = values.shape[1]
        count = self.of(hidden_size)
        if not count:
            return values
        first = hidden_size - count
        where = np.argpartition(np.abs(values), first, axis=1)[:, first:]
        field[:, : 2 * count] = as_bytes(where.astype(np.uint16))
        field[:, 2 * count :] = as_bytes(np.take_along_axis(values, where, axis=1))
        rest = values.copy()
        np.put_along_axis(rest, where, np.float32(0), axis=1)
        return rest

    def put_back(self, values: NDArray[np.float32], field: Bytes) -> None:
        """Write the outliers in `field` into `values` [n, hidden_size].

        Raises:
            ValueError: an index is not below hidden_size.
        """
        hidden_size = values.shape[1]
        count = self.of(hidden_size)
        if not count:
            return
        where = as_numbers(field[:, : 2 * count], "<u2").astype(np.intp)
        if where.max() >= hidden_size:
            raise ValueError(f"payload has an outlier at element {where.max()} of {hidden_size}")
        np.put_along_axis(values, where, as_numbers(field[:, 2 * count :], "<f4"), axis=1)
