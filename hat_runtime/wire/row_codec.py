"""What a codec is: hidden states to bytes and back, the same number of bytes for every row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hat_runtime.wire.dtypes import dtype_name, to_float32, to_tensor

Bytes = NDArray[np.uint8]


class RowCodec(ABC):
    """Encodes each row by itself: a row's bytes depend on nothing but the row, and a payload is n rows, no more."""

    name: str

    @abstractmethod
    def row_bytes(self, hidden_size: int, dtype: torch.dtype) -> int:
        """Bytes of one hidden state of `hidden_size` elements; `dtype` is the compute dtype."""

    @abstractmethod
    def encode(self, hidden: torch.Tensor) -> bytes:
        """Hidden states [n, hidden_size] of a compute dtype, on any device -> n * row_bytes bytes.

        A row with a value that is not finite is decoded to one that has such values too.
        """

    @abstractmethod
    def decode(
        self, payload: bytes | bytearray, n: int, hidden_size: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Payload bytes -> hidden states [n, hidden_size] of `dtype` on the CPU.

        Raises:
            ValueError: the payload has not exactly n rows of hidden_size elements, or names an element that there
                is not.
        """

    def check_size(self, payload: bytes | bytearray, n: int, hidden_size: int, dtype: torch.dtype) -> None:
        """Raise ValueError unless the payload is exactly n rows."""
        want = n * self.row_bytes(hidden_size, dtype)
        if len(payload) != want:
            raise ValueError(
                f"payload has {len(payload)} bytes, but {self.describe(n, hidden_size, dtype)} are {want} bytes"
            )

    def describe(self, n: int, hidden_size: int, dtype: torch.dtype) -> str:
        """n rows in words, for messages."""
        return f"n={n} rows of {hidden_size} x {dtype_name(dtype)} in codec {self.name}"


class FieldCodec(RowCodec):
    """A codec that works on float32 values and lays its rows out as fields of bytes side by side."""

    def encode(self, hidden: torch.Tensor) -> bytes:
        """See RowCodec."""
        n, hidden_size = hidden.shape
        rows = np.empty((n, self.row_bytes(hidden_size, hidden.dtype)), np.uint8)
        if n:
            with np.errstate(all="ignore"):  # values that are not finite are the receiver's to refuse
                self._pack(to_float32(hidden), rows)
        return rows.tobytes()

    def decode(
        self, payload: bytes | bytearray, n: int, hidden_size: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """See RowCodec."""
        self.check_size(payload, n, hidden_size, dtype)
        if n == 0:
            return torch.empty(0, hidden_size, dtype=dtype)
        with np.errstate(all="ignore"):
            values = self._unpack(np.frombuffer(payload, np.uint8).reshape(n, -1), hidden_size)
        return to_tensor(values, dtype)

    @abstractmethod
    def _pack(self, values: NDArray[np.float32], rows: Bytes) -> None:
        """Fill `rows` [n, row_bytes] with the values [n, hidden_size], n >= 1."""

    @abstractmethod
    def _unpack(self, rows: Bytes, hidden_size: int) -> NDArray[np.float32]:
        """The values [n, hidden_size] of `rows` [n, row_bytes], n >= 1, in memory of their own."""


def as_bytes(field: NDArray[np.generic]) -> Bytes:
    """A field [n, k] of little-endian numbers -> its bytes [n, k * itemsize]."""
    little = field.astype(field.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).view(np.uint8).reshape(len(field), -1)


def as_numbers(field: Bytes, kind: str) -> NDArray[Any]:
    """Bytes [n, k * itemsize] -> numbers [n, k] of a little-endian numpy dtype, such as "<u2"."""
    return np.ascontiguousarray(field).view(np.dtype(kind))
