"""Linear layers whose weights lie in memory as the CPU's matrix unit reads them.

With bfloat16 on a CPU with AMX or AVX-512, oneDNN brings a plain weight into its own blocked layout at every call with
more than one row. Done once, while loading, this makes a pass of 128 rows 1.5 x and one of 8 rows 1.5 x faster
(docs/decisions/0007). The operators are the ones that torch's inductor uses; they are private, so that this is the only
module that names them, and without them everything stays as it was.
"""

from __future__ import annotations

import torch

_ROWS = 128
"""Rows that the layout is chosen for; others are as fast with it."""


class PackedLinear(torch.nn.Module):
    """`torch.nn.Linear` with a packed weight: x [..., in_features] -> [..., out_features]. Inference only."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """See the class."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return out


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packing helps here and torch has what it takes."""
    operators = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return (
        dtype is torch.bfloat16
        and device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and all(hasattr(torch.ops.mkldnn, name) for name in operators)
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack_linears(module: torch.nn.Module) -> None:
    """Replace every `torch.nn.Linear` below `module` by its packed form, and let go of the plain weight."""
    for name, child in list(module.named_children()):
        if type(child) is torch.nn.Linear:
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)
