"""Packed layers compute what the plain ones do, and only what is understood is replaced."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.activations import ACT2FN

from hat_runtime.model.packed import PackedGatedMLP, PackedLinear, can_pack, pack_linears

CPU = torch.device("cpu")
needs_packing = pytest.mark.skipif(
    not can_pack(torch.bfloat16, CPU), reason="this CPU does not compute in bfloat16"
)


class Mlp(torch.nn.Module):
    """The shape that transformers' gated MLPs share."""

    def __init__(self, act: str, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(64, 160, bias=bias)
        self.up_proj = torch.nn.Linear(64, 160, bias=bias)
        self.down_proj = torch.nn.Linear(160, 64, bias=bias)
        self.act_fn = ACT2FN[act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class OtherMlp(Mlp):
    """The same parts, another formula."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def packed(module: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(the module packed, the same weights in float32)."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    holder = torch.nn.Sequential(module.to(torch.bfloat16).requires_grad_(False))
    exact = copy.deepcopy(module).float()
    pack_linears(holder)
    return holder[0], exact


@needs_packing
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 130])
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_close_to_float32(act: str, rows: int, bias: bool) -> None:
    layers, exact = packed(Mlp(act, bias))
    assert isinstance(layers, PackedGatedMLP) == (act == "silu")
    x = torch.randn(1, rows, 64).to(torch.bfloat16)
    with torch.inference_mode():
        expected = exact(x.float())
        error = (layers(x).float() - expected).norm() / expected.norm()
    assert error < 0.01  # bfloat16 has 8 bits


@needs_packing
def test_another_formula_keeps_its_own_code() -> None:
    layers, exact = packed(OtherMlp("silu"))
    assert isinstance(layers, OtherMlp)
    assert isinstance(layers.up_proj, PackedLinear)
    x = torch.randn(3, 64).to(torch.bfloat16)
    with torch.inference_mode():
        expected = exact(x.float())
        assert (layers(x).float() - expected).norm() / expected.norm() < 0.01


@needs_packing
def test_plain_weights_are_let_go() -> None:
    layers, _ = packed(Mlp("silu"))
    assert not list(layers.parameters())


def test_float32_is_left_alone() -> None:
    assert not can_pack(torch.float32, CPU)
