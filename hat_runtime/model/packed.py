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

GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
"""Children of the gated MLP (SwiGLU, Shazeer, arXiv 2002.05202) that the supported architectures share."""


class PackedLinear(torch.nn.Module):
    """`torch.nn.Linear` with a packed weight: x [..., in_features] -> [..., out_features]. Inference only."""

    def __init__(self, *linears: torch.nn.Linear) -> None:
        """Several layers over the same input become one; their outputs follow one another."""
        super().__init__()
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        if len(biases) not in (0, len(linears)):
            raise ValueError("some of the layers have a bias, others have none")
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        self.bias = torch.cat(biases) if biases else None

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.then(rows, "none")

    def then(self, rows: torch.Tensor, function: str) -> torch.Tensor:
        """An elementwise function of the output, as oneDNN names it, before the output is rounded and written."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, function, [], "")
        return out

    def times(self, rows: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """The output times a factor of its shape, multiplied before the output is rounded and written."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            rows, factor, self.weight, self.bias, "mul"
        )
        return out


class PackedGatedMLP(torch.nn.Module):
    """down(silu(gate(x)) * up(x)) with both elementwise steps inside the matrix products. Inference only."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.gate_proj = PackedLinear(mlp.gate_proj)  # type: ignore[arg-type]
        self.up_proj = PackedLinear(mlp.up_proj)  # type: ignore[arg-type]
        self.down_proj = PackedLinear(mlp.down_proj)  # type: ignore[arg-type]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """x [..., hidden_size] -> [..., hidden_size]."""
        gate = self.gate_proj.then(rows, "swish")
        out: torch.Tensor = self.down_proj(self.up_proj.times(rows, gate))
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


def packed_linear(weight: torch.Tensor) -> torch.nn.Module:
    """x [..., in] -> x weight^T [..., out] for weight [out, in], packed where that helps."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return PackedLinear(linear) if can_pack(weight.dtype, weight.device) else linear


def pack_linears(module: torch.nn.Module) -> None:
    """Replace every gated MLP and `torch.nn.Linear` below `module` by its packed form; the plain weights go."""
    for name, child in list(module.named_children()):
        if type(child) is torch.nn.Linear:
            setattr(module, name, PackedLinear(child))
        elif is_gated_mlp(child):
            setattr(module, name, PackedGatedMLP(child))
        else:
            pack_linears(child)


def is_gated_mlp(module: torch.nn.Module) -> bool:
    """Whether the module has a gated MLP's parts and computes what PackedGatedMLP does."""
    parts = dict(module.named_children())
    if set(parts) != GATED or list(module.parameters(recurse=False)):
        return False
    gate, up, down, act = (parts[name] for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))
    if not (type(gate) is torch.nn.Linear and type(up) is torch.nn.Linear and type(down) is torch.nn.Linear):
        return False
    probe = torch.linspace(-4, 4, 64)
    if not torch.allclose(act(probe), torch.nn.functional.silu(probe), atol=1e-6):
        return False
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, gate.in_features, generator=generator).to(gate.weight.dtype)
    with torch.inference_mode():
        return torch.equal(module(rows), down(act(gate(rows)) * up(rows)))
