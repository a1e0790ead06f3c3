"""The small networks that guess what the cloud's layers will say: what they compute, and their files.

adapter   HAT's own (arXiv 2503.18989, section III; Kangaroo, arXiv 2404.18911): x + SelfAttention(RMSNorm(x)), then
          RMSNorm, over shallow states. It guesses the deep state of the same position.
feature   EAGLE's idea (arXiv 2401.15077) on HAT's split: reads the shallow state of a token together with the deep
          state of the token before it, which the device has been sent, or has guessed itself. For prompt positions,
          whose deep states are not sent down, it reads a learned mask instead.
layer     a whole decoder layer over shallow states: with the device's layers below it, it is a small language model
          (draft_model.py).

All guess in the head's input space (after the final norm), so that the model's own head, or the rows of it for frequent
tokens, turns a guess into a distribution.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hat_runtime.errors import ModelError

KINDS = ("adapter", "feature", "layer")
FORMAT = 1
SHIPPED = Path(__file__).parent / "drafters"
"""Drafters that come with HAT (docs/benchmarks/drafters.md says how they were made)."""


@dataclass(frozen=True)
class DrafterShape:
    """What a drafter is made of."""

    kind: str
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_size: int
    """Width of the gated MLP; 0: none."""
    rope_theta: float
    norm_eps: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ModelError(f"drafter kind {self.kind!r} is none of {', '.join(KINDS)}")


@dataclass(frozen=True)
class DrafterInfo:
    """What a drafter file says of itself."""

    shape: DrafterShape
    weights_id: str
    """Of the model that it was trained for."""
    input_layers: int
    """m: after how many layers its shallow states were taken."""
    notes: dict[str, Any] = field(default_factory=dict)
    """How it was made, and the figures that were seen."""


class DrafterNet(torch.nn.Module):
    """The network of a drafter. Everything but the attention itself, which its caller computes over its own cache."""

    def __init__(self, shape: DrafterShape) -> None:
        super().__init__()
        self.shape = shape
        h, hd = shape.hidden_size, shape.head_dim
        if shape.kind == "feature":
            self.mask = torch.nn.Parameter(torch.zeros(h))
            self.feature_norm = torch.nn.Parameter(torch.ones(h))
            self.shallow_norm = torch.nn.Parameter(torch.ones(h))
            self.join = torch.nn.Linear(2 * h, h, bias=False)
        self.input_norm = torch.nn.Parameter(torch.ones(h))
        self.qkv = torch.nn.Linear(h, (shape.heads + 2 * shape.kv_heads) * hd, bias=False)
        self.out = torch.nn.Linear(shape.heads * hd, h, bias=False)
        if shape.mlp_size:
            self.mlp_norm = torch.nn.Parameter(torch.ones(h))
            self.gate_up = torch.nn.Linear(h, 2 * shape.mlp_size, bias=False)
            self.down = torch.nn.Linear(shape.mlp_size, h, bias=False)
        self.norm = torch.nn.Parameter(torch.ones(h))

    def rows(self, shallow: torch.Tensor, features: torch.Tensor | None) -> torch.Tensor:
        """The layer's input rows [n, hidden_size].

        Args:
            shallow: shallow states [n, hidden_size].
            features: kind "feature" only: normed deep states of the positions before, [n, hidden_size].
        """
        if self.shape.kind != "feature":
            return shallow
        assert features is not None
        pair = torch.cat([self._rms(features, self.feature_norm), self._rms(shallow, self.shallow_norm)], -1)
        rows: torch.Tensor = self.join(pair)
        return rows

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """Query, key and value heads of input rows, before rotation: [n, heads + 2 * kv_heads, head_dim]."""
        qkv: torch.Tensor = self.qkv(self._rms(rows, self.input_norm))
        return qkv.view(len(rows), -1, self.shape.head_dim)

    def finish(self, rows: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """From input rows and their attention [n, heads * head_dim] to guesses in the head's input space."""
        hidden: torch.Tensor = rows + self.out(attended)
        if self.shape.mlp_size:
            gate, up = self.gate_up(self._rms(hidden, self.mlp_norm)).chunk(2, -1)
            hidden = hidden + self.down(F.silu(gate) * up)
        return self._rms(hidden, self.norm)

    def _rms(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = torch.rms_norm(rows, rows.shape[-1:], None, self.shape.norm_eps)
        return normed * weight.to(rows.dtype)


def rotation(positions: torch.Tensor, shape: DrafterShape) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of rotary positions (RoFormer, arXiv 2104.09864): float32 [n, 1, head_dim] each."""
    half = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float32) / shape.head_dim
    angles = positions[:, None].float() * shape.rope_theta**-half
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos(), angles.sin()


def rotate(heads: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate heads [n, heads, head_dim] by `rotation`, in transformers' order of the two halves."""
    cos, sin = (part.to(heads.dtype) for part in turn)
    left, right = heads.chunk(2, -1)
    return heads * cos + torch.cat([-right, left], -1) * sin


def save_drafter(path: Path, net: DrafterNet, info: DrafterInfo, draft_ids: torch.Tensor) -> None:
    """Write a drafter file: bfloat16 safetensors; not before it is complete does it have its name.

    Args:
        path: file.
        net: the network.
        info: its description.
        draft_ids: int32 [k], the token ids that it may draft, ascending.
    """
    tensors = {name: value.detach().to("cpu", torch.bfloat16) for name, value in net.state_dict().items()}
    tensors["draft_ids"] = draft_ids.to("cpu", torch.int32)
    about = {"format": FORMAT} | asdict(info)
    partial = path.with_name(path.name + ".part")
    save_file(tensors, partial, metadata={"hat_drafter": json.dumps(about)})
    partial.chmod(0o644)  # safetensors leaves it to the owner alone, and servers run as somebody else
    partial.replace(path)


def save_layer(path: Path, net: DrafterNet) -> None:
    """Write a network of kind "layer" and its norm by transformers' names for a Llama layer (draft_model.py)."""
    shape = net.shape
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    qkv, gate_up = net.qkv.weight.detach(), net.gate_up.weight.detach()
    tensors = {
        "self_attn.q_proj.weight": qkv[:query],
        "self_attn.k_proj.weight": qkv[query : query + key],
        "self_attn.v_proj.weight": qkv[query + key :],
        "self_attn.o_proj.weight": net.out.weight.detach(),
        "mlp.gate_proj.weight": gate_up[: shape.mlp_size],
        "mlp.up_proj.weight": gate_up[shape.mlp_size :],
        "mlp.down_proj.weight": net.down.weight.detach(),
        "input_layernorm.weight": net.input_norm.detach(),
        "post_attention_layernorm.weight": net.mlp_norm.detach(),
        "norm.weight": net.norm.detach(),
    }
    partial = path.with_name(path.name + ".part")
    save_file(
        {name: value.to("cpu", torch.bfloat16).contiguous() for name, value in tensors.items()}, partial
    )
    partial.chmod(0o644)
    partial.replace(path)


def read_info(path: Path) -> DrafterInfo:
    """The description in a drafter file.

    Raises:
        ModelError: no such file, or no drafter.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["hat_drafter"])
        if about.pop("format") != FORMAT:
            raise ModelError(f"{path} has another format than this version reads; train it again")
        return DrafterInfo(**(about | {"shape": DrafterShape(**about["shape"])}))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ModelError(f"{path} is no drafter file of `hat train-drafter`: {error}") from error


def load_drafter(path: Path, dtype: torch.dtype, device: torch.device) -> tuple[DrafterNet, torch.Tensor]:
    """The network, for inference, and int64 [k] the token ids that it may draft.

    Raises:
        ModelError: no drafter file, or its tensors do not fit its description.
    """
    net = DrafterNet(read_info(path).shape)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    ids = tensors.pop("draft_ids").long()
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise ModelError(f"{path}: its tensors do not fit its description: {error}") from error
    return net.to(device=device, dtype=dtype).eval().requires_grad_(False), ids.to(device)


def check_fit(path: Path, info: DrafterInfo, weights_id: str, input_layers: int) -> None:
    """Refuse a drafter of another model or split. Raises ModelError with both values."""
    for name, of_file, wanted in (
        ("weights_id", info.weights_id, weights_id),
        ("input_layers", info.input_layers, input_layers),
    ):
        if of_file != wanted:
            raise ModelError(f"{path} was trained for {name} {of_file}, but the model has {wanted}")


def file_name(kind: str, weights_id: str, input_layers: int) -> str:
    """By which a drafter is found."""
    return f"{weights_id[:16]}-m{input_layers}-{kind}.safetensors"


def find_drafter(kind: str, weights_id: str, input_layers: int, folder: Path | None = None) -> Path | None:
    """The file of a trained drafter: in the model folder's `drafters`, or among those that come with HAT."""
    name = file_name(kind, weights_id, input_layers)
    places = [SHIPPED] if folder is None else [folder / "drafters", SHIPPED]
    return next((place / name for place in places if (place / name).is_file()), None)
