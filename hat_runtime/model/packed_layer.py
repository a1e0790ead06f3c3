"""Whole decoder layers of packed linear layers: the same formula as transformers' in fewer calls.

A pass of few rows costs one core as much in calls as in arithmetic, and chunks of a prompt are such passes
(docs/decisions/0007). So the query, key and value projections are one product here, their rotation is one, and nothing
lies between the operators but this file. A layer is replaced only where it has exactly the parts of Llama's (arXiv
2302.13971: pre-norm, rotary positions, gated MLP), and only if its replacement gives the same output, keys and values
for random rows; any other keeps transformers' code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from hat_runtime.model.attention import AttentionBackend, AttentionBatch, Span
from hat_runtime.model.packed import GATED, PackedGatedMLP, PackedLinear, is_gated_mlp
from hat_runtime.model.pages import KvCache

log = logging.getLogger(__name__)
Attend = Callable[..., tuple[torch.Tensor, None]]
"""transformers' attention function over the paged cache (hf.py)."""

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_CLOSE = 2**-7
"""Largest relative distance of two ways to round to bfloat16, which has 8 bits."""


class PackedLayer(torch.nn.Module):
    """A pre-norm decoder layer with rotary positions and a gated MLP, bfloat16 on a CPU. Inference only."""

    def __init__(self, layer: Any, attend: Attend, *, scale: float, window: int | None) -> None:
        """Takes the weights of `layer`; scale and window are those that its attention uses."""
        super().__init__()
        attention = layer.self_attn
        self.layer_idx: int = attention.layer_idx
        self._head_dim: int = attention.head_dim
        self._heads = attention.q_proj.out_features // self._head_dim
        self._kv_heads = attention.k_proj.out_features // self._head_dim
        self._qkv = PackedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = PackedLinear(attention.o_proj)
        self._mlp = PackedGatedMLP(layer.mlp)
        self._norms = [
            (norm.weight.detach(), tuple(norm.weight.shape), norm.variance_epsilon)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        self._attend = attend
        self._scale, self._window = scale, window

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        hat: AttentionBatch,
        **ignored: Any,
    ) -> torch.Tensor:
        """transformers' signature: hidden_states [1, T, hidden_size] -> [1, T, hidden_size]."""
        rows = hidden_states.shape[1]
        qkv = self._qkv(self._norm(0, hidden_states)).view(1, rows, -1, self._head_dim)
        turning = self._heads + self._kv_heads
        turned = _rotate(qkv[:, :, :turning], position_embeddings, hat).transpose(1, 2)
        attended, _ = self._attend(
            self,
            turned[:, : self._heads],
            turned[:, self._heads :],
            qkv[:, :, turning:].transpose(1, 2),
            None,
            hat=hat,
            scaling=self._scale,
            sliding_window=self._window,
        )
        hidden = hidden_states + self._out(attended.reshape(1, rows, -1))
        out: torch.Tensor = hidden + self._mlp(self._norm(1, hidden))
        return out

    def _norm(self, which: int, rows: torch.Tensor) -> torch.Tensor:
        weight, shape, epsilon = self._norms[which]
        # The weight outside, as transformers has it: the normalised rows are rounded first.
        normed: torch.Tensor = weight * torch.rms_norm(rows, shape, None, epsilon)
        return normed


def _rotate(
    heads: torch.Tensor, embeddings: tuple[torch.Tensor, torch.Tensor], batch: AttentionBatch
) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864, in halves) of [1, T, heads, head_dim] in one go.

    x cos + (-x2, x1) sin = x cos + roll(x) (-sin1, sin2), whose factors are the same in all layers of a pass.
    """
    half = heads.shape[-1] // 2
    if batch.rotation is None or batch.rotation[0] is not embeddings:
        cos, sin = embeddings
        signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        batch.rotation = (embeddings, cos.unsqueeze(2), signed.unsqueeze(2))
    _, cosine, sine = batch.rotation
    turned: torch.Tensor = (heads * cosine).add_(heads.roll(half, -1).mul_(sine))
    return turned


def pack_layers(model: Any, attend: Attend) -> None:
    """Replace the layers of a transformers model that PackedLayer computes; the others stay as they are.

    Args:
        model: has `layers` with plain linear layers in bfloat16 on the CPU, and `rotary_emb`.
        attend: the attention function that its layers call.
    """
    for index, layer in enumerate(model.layers):
        if _has_the_parts(layer) and (packed := _checked(model, layer, attend)) is not None:
            model.layers[index] = packed


def _has_the_parts(layer: torch.nn.Module) -> bool:
    parts = dict(layer.named_children())
    if set(parts) != _LAYER or set(dict(parts["mlp"].named_children())) != GATED:
        return False
    attention = dict(parts["self_attn"].named_children())
    norms = (parts["input_layernorm"], parts["post_attention_layernorm"])
    return (
        set(attention) == _ATTENTION
        and all(type(part) is torch.nn.Linear for part in attention.values())
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
        and is_gated_mlp(parts["mlp"])
    )


class _Look(AttentionBackend):
    """Sees how a layer calls the attention; gives back the queries."""

    name = "look"
    scale: float = 1.0
    window: int | None = None

    def prepare(self, spans: list[Span], cache: KvCache) -> None:
        """Nothing."""

    def attend(
        self, layer: int, query: torch.Tensor, batch: AttentionBatch, *, scale: float, window: int | None
    ) -> torch.Tensor:
        """See AttentionBackend.attend."""
        self.scale, self.window = scale, window
        return query.transpose(0, 1)


@torch.inference_mode()
def _checked(model: Any, layer: Any, attend: Attend) -> PackedLayer | None:
    """The packed form, if it computes what the layer does."""
    attention = layer.self_attn
    rows, kv_heads = 5, attention.k_proj.out_features // attention.head_dim
    weight = attention.q_proj.weight
    cache = KvCache(
        layers=attention.layer_idx + 1,
        kv_heads=kv_heads,
        head_dim=attention.head_dim,
        num_pages=1,
        page_tokens=rows,
        dtype=weight.dtype,
        device=weight.device,
    )
    noise = torch.randn(1, rows, weight.shape[1], generator=torch.Generator().manual_seed(0))
    hidden = (noise / 16).to(weight.dtype)
    embeddings = model.rotary_emb(hidden, torch.arange(rows)[None])
    look = _Look()

    def run(module: torch.nn.Module) -> tuple[torch.Tensor, ...]:
        batch = AttentionBatch(look, cache, [Span(0, rows, 0, torch.arange(rows))])
        keys, values = cache.layers[attention.layer_idx]
        keys.zero_(), values.zero_()
        out = module(hidden, position_embeddings=embeddings, attention_mask=None, hat=batch)
        # What the layer adds: the residual would hide a difference.
        return out - hidden, keys.clone(), values.clone()

    expected = run(layer)
    packed = PackedLayer(layer, attend, scale=look.scale, window=look.window)
    same = all(
        (found - wanted).float().norm() <= _CLOSE * wanted.float().norm()
        for found, wanted in zip(run(packed), expected, strict=True)
    )
    if not same:
        log.warning("layer %d is not packed: its packed form computes something else", attention.layer_idx)
    return packed if same else None
