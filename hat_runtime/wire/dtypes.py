"""Compute dtypes by name, and hidden states as numpy arrays.

The codecs compute in numpy: they run on event loops, and torch belongs to one thread of a process
(docs/decisions/0006-one-torch-thread.md). numpy has no bfloat16, so its bits are handled here.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Compute dtypes by their name on the wire and on the command line."""


def dtype_name(dtype: torch.dtype) -> str:
    """The wire's name of a torch dtype. Raises ValueError for one that has none."""
    for name, candidate in DTYPES.items():
        if candidate == dtype:
            return name
    raise ValueError(f"dtype {dtype} has no name on the wire; use one of {', '.join(DTYPES)}")


def to_float32(hidden: torch.Tensor) -> NDArray[np.float32]:
    """Hidden states [n, hidden_size] of a compute dtype, on any device -> float32 array of the same shape.

    May share the tensor's memory: not to be written to.
    """
    rows = hidden.detach().to("cpu").contiguous()
    if rows.dtype == torch.bfloat16:
        return from_bfloat16(rows.view(torch.int16).numpy().view(np.uint16))
    array: NDArray[np.float32] = rows.numpy()
    return array


def to_tensor(values: NDArray[np.float32], dtype: torch.dtype) -> torch.Tensor:
    """float32 array -> CPU tensor of a compute dtype, rounded to nearest even where it is narrower."""
    if dtype == torch.bfloat16:
        return torch.from_numpy(to_bfloat16(values).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 -> bits of the nearest bfloat16, ties to even; NaN stays NaN, what is too large becomes infinite."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():  # rounding may carry out of a NaN's mantissa
        rounded[nan] = 0x7FC0
    return rounded


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Bits of bfloat16 -> the same values in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
