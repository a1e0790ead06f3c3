"""Packed decoder layers compute what transformers' do; layers of another shape keep transformers' code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hat_runtime.model import hf, packed_layer
from hat_runtime.model.attention import make_backend
from hat_runtime.model.packed import can_pack
from hat_runtime.model.packed_layer import PackedLayer
from hat_runtime.model.pages import PagedSequence
from hat_runtime.model.runner import LayerRunner, Segment, make_cache
from hat_runtime.model.split import LayerRange

needs_packing = pytest.mark.skipif(
    not can_pack(torch.bfloat16, torch.device("cpu")), reason="this CPU does not compute in bfloat16"
)
PACKED = {
    "llama": True,
    "mistral": True,
    "qwen2": True,
    "qwen3": False,
    "qwen3_moe": False,
    "gemma3_text": False,
}


def deep_states(layers: hf.DecoderSlice, hidden: torch.Tensor) -> torch.Tensor:
    """Of a text computed in unequal chunks."""
    runner = LayerRunner(layers, make_cache(layers, num_pages=16, page_tokens=8), make_backend("sdpa"))
    sequence, at, found = PagedSequence(), 0, []
    for count in (1, 20, 7, 2):
        found += runner.run([Segment(sequence, at, hidden[at : at + count])])
        at += count
    return torch.cat(found).float()


@needs_packing
@pytest.mark.parametrize("arch", PACKED)
def test_equals_the_layers_it_replaces(
    arch: str, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, bounds = tiny_models[arch], LayerRange(1, 3)
    layers = hf.load_decoder_slice(folder, bounds, torch.bfloat16)
    assert all(isinstance(layer, PackedLayer) == PACKED[arch] for layer in layers._model.layers)  # type: ignore[union-attr]
    monkeypatch.setattr(hf, "pack_layers", lambda *_: None)
    plain = hf.load_decoder_slice(folder, bounds, torch.bfloat16)
    exact = hf.load_decoder_slice(folder, bounds, torch.float32)
    hidden = torch.randn(30, layers.hidden_size, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = deep_states(exact, hidden.float())

    def error(found: torch.Tensor) -> float:
        return float((found - expected).norm() / expected.norm())

    assert error(deep_states(layers, hidden)) <= max(0.01, 1.2 * error(deep_states(plain, hidden)))


@needs_packing
@pytest.mark.parametrize("change", ["no norm", "scaled norm"])
def test_a_layer_with_another_formula_is_not_replaced(
    change: str, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(model: Any, attend: Any) -> None:
        for layer in model.layers:
            if change == "no norm":
                layer.input_layernorm.forward = lambda rows: rows
            else:
                layer.post_attention_layernorm.forward = lambda rows: 0.9 * rows
        packed_layer.pack_layers(model, attend)

    monkeypatch.setattr(hf, "pack_layers", changed)
    layers = hf.load_decoder_slice(tiny_models["llama"], LayerRange(0, 2), torch.bfloat16)
    assert not any(isinstance(layer, PackedLayer) for layer in layers._model.layers)  # type: ignore[union-attr]
