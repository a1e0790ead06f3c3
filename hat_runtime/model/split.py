"""Where a model is cut."""

from __future__ import annotations

from dataclasses import dataclass

from hat_runtime.errors import UsageError


@dataclass(frozen=True)
class LayerRange:
    """Decoder layers lo <= i < hi."""

    lo: int
    hi: int

    def __post_init__(self) -> None:
        if not 0 <= self.lo <= self.hi:
            raise UsageError(f"layer range {self.lo}:{self.hi} is not 0 <= lo <= hi")

    def __len__(self) -> int:
        return self.hi - self.lo

    def __str__(self) -> str:
        return f"{self.lo}:{self.hi}"

    def __contains__(self, layer: int) -> bool:
        return self.lo <= layer < self.hi


def device_layers(input_layers: int, num_layers: int) -> LayerRange:
    """The layers of the input submodel, 0:m.

    Raises:
        UsageError: not 1 <= m < num_layers, so that one side would hold no layer.
    """
    _check(input_layers, num_layers)
    return LayerRange(0, input_layers)


def cloud_layers(input_layers: int, num_layers: int) -> LayerRange:
    """The layers of the middle submodel, m:num_layers.

    Raises:
        UsageError: not 1 <= m < num_layers, so that one side would hold no layer.
    """
    _check(input_layers, num_layers)
    return LayerRange(input_layers, num_layers)


def _check(input_layers: int, num_layers: int) -> None:
    if not 1 <= input_layers < num_layers:
        raise UsageError(
            f"--input-layers {input_layers}: the device must hold at least 1 of the model's {num_layers} layers "
            f"and the cloud at least 1, so write 1 to {num_layers - 1}"
        )
