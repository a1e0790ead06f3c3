"""From the option --drafter to a drafter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from hat_runtime.device.drafting.base import Drafter
from hat_runtime.device.drafting.hybrid import HybridDrafter
from hat_runtime.device.drafting.network import NetworkDrafter
from hat_runtime.device.drafting.ngram import NgramDrafter
from hat_runtime.device.drafting.small_model import ModelDrafter
from hat_runtime.errors import UsageError
from hat_runtime.model.drafter import find_drafter
from hat_runtime.model.hf import DeviceEnds

AUTO, NONE = "auto", "none"
TRAINED = ("feature", "adapter")
"""The better one first."""
NAMES = (AUTO, NONE, "ngram", *TRAINED, "hybrid")


def check_name(name: str) -> None:
    """Refuse an unknown drafter. Raises UsageError."""
    kind, _, rest = name.partition(":")
    if name in NAMES or (kind in ("model", *TRAINED, "hybrid") and rest):
        return
    raise UsageError(
        f"--drafter {name!r}: must be one of {', '.join(NAMES)}, model:FOLDER, or adapter:FILE, feature:FILE and "
        "hybrid:FILE with a file of `hat train-drafter`"
    )


def drafter_maker(
    name: str, folder: Path, weights_id: str, input_layers: int, dtype: torch.dtype, *, kv_tokens: int
) -> Callable[[DeviceEnds], Drafter | None]:
    """How to make the drafter `name`, once embedding and head are there.

    Args:
        name: as --drafter says. "auto" is `hybrid` where a trained drafter is found, else `ngram`.
        folder: the model folder; its subfolder `drafters` may hold trained ones.
        weights_id: of the model.
        input_layers: m.
        dtype: compute dtype.
        kv_tokens: tokens that all sessions of this device may hold together.

    Raises:
        UsageError: no such drafter, or none was trained for this model and split.
        ModelError: its file or folder cannot be used.
    """
    check_name(name)
    kind, _, where = name.partition(":")
    if kind == NONE:
        return lambda ends: None
    if kind == "ngram":
        return lambda ends: NgramDrafter()
    if kind == "model":
        return lambda ends: ModelDrafter(
            Path(where), dtype, ends.device, ends.vocab_size, kv_tokens=kv_tokens
        )
    path = Path(where) if where else None
    for wanted in (kind,) if kind in TRAINED else TRAINED:
        path = path or find_drafter(wanted, weights_id, input_layers, folder)
    if path is None:
        if kind == AUTO:
            return lambda ends: NgramDrafter()
        raise UsageError(
            f"--drafter {name}: none was trained for this model (weights_id {weights_id[:12]}) and "
            f"{input_layers} layers on the device; train one with `hat train-drafter`, or take --drafter ngram"
        )
    found = path

    def make(ends: DeviceEnds) -> Drafter:
        network = NetworkDrafter(found, ends, dtype, weights_id, input_layers, kv_tokens=kv_tokens)
        return network if kind in TRAINED else HybridDrafter(network)

    return make
