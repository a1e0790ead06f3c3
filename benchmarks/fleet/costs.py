"""What the parts of a fleet cost in time: the paper's hardware by published figures, or what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hat_runtime.control.pass_cost import PassCost


class CloudCost(Protocol):
    """Duration of a pass of the middle layers."""

    def pass_s(self, new: int, pairs: float, cached: float) -> float:
        """Seconds.

        Args:
            new: rows of all texts.
            pairs: sum over the texts of rows x tokens.
            cached: sum over the texts of their tokens.
        """
        ...


@dataclass(frozen=True)
class MeasuredCloud:
    """A cloud's own fit of its passes (CostHints)."""

    cost: PassCost

    def pass_s(self, new: int, pairs: float, cached: float) -> float:
        """See CloudCost."""
        cost = self.cost
        return cost.fixed_s + cost.per_token_s * new + cost.per_pair_s * pairs + cost.per_cached_s * cached


@dataclass(frozen=True)
class Gpu:
    """A GPU by its roofline: weights are read once a pass, each row is computed, each text's cache is read."""

    weights_s: float
    row_s: float
    cached_token_s: float
    overhead_s: float
    """Of a pass, beyond what the hardware needs."""

    def pass_s(self, new: int, pairs: float, cached: float) -> float:
        """See CloudCost."""
        return self.overhead_s + max(self.weights_s, self.row_s * new) + self.cached_token_s * cached


@dataclass(frozen=True)
class DeviceCost:
    """What passes cost a device, in seconds."""

    shallow: PassCost
    """Embedding and input layers."""
    head: PassCost
    """Final norm, LM head and the choice of a token, by rows."""
    draft_s: float
    """The drafter and its head, one token."""
    step_s: float = 0.0
    """Whatever else a Step costs on its way, up or down: messages, threads."""


@dataclass(frozen=True)
class PaperModel:
    """A model on the paper's hardware (arXiv 2503.18989)."""

    name: str
    hidden_size: int
    cloud: Gpu
    kv_tokens: int
    """That a GPU's memory holds beside the weights."""
    devices: tuple[tuple[str, int, DeviceCost], ...]
    """(name, how many, cost)"""
    tokens_a_round: float
    """As published, with eta 0.6 and at most 6 drafts."""


A6000_BYTES_S, A6000_FLOPS, A6000_BYTES = 768e9, 75e12, 48e9
"""Memory rate and size by NVIDIA's data sheet; 75 TFLOP/s is what picospec's worked examples reckon with."""
ORIN_BYTES_S, XAVIER_BYTES_S = 204.8e9, 136.5e9
"""Memory rates of Jetson AGX Orin and AGX Xavier, NVIDIA's data sheets."""
ORIN_FLOPS, XAVIER_FLOPS = 10e12, 5e12
"""Assumed for prompts: 0.08 ms a token of Vicuna-7B's two layers on the Orin, half the speed on the Xavier."""
OVER_FLOOR = 1.4
"""Device passes over reading the weights once: the paper's rounds leave 8 to 12 ms for a draft, the floors are 5.9
and 8.8."""


def _paper_model(
    name: str,
    hidden_size: int,
    *,
    cloud_parameters: float,
    kv_bytes: float,
    stage_s: float,
    layers_parameters: float,
    adapter_parameters: float,
    head_parameters: float,
    tokens_a_round: float,
) -> PaperModel:
    """From counts of parameters (2 bytes each), the cache's bytes for a token, and the published delay of a stage.

    The published delay is that of one of four GPUs that hold a quarter of the layers each; its floor for small batches
    (U-Sarathi's) times four is what a pass takes in all.
    """
    weights_s = 2 * cloud_parameters / A6000_BYTES_S
    gpu = Gpu(
        weights_s=weights_s,
        row_s=2 * cloud_parameters / A6000_FLOPS,
        cached_token_s=kv_bytes / A6000_BYTES_S,
        overhead_s=max(0.0, 4 * stage_s - weights_s),
    )

    def device(bytes_s: float, flops: float) -> DeviceCost:
        def read_s(parameters: float) -> float:
            return OVER_FLOOR * 2 * parameters / bytes_s

        return DeviceCost(
            PassCost(read_s(layers_parameters), 2 * layers_parameters / flops),
            PassCost(read_s(head_parameters), 2 * head_parameters / flops),
            read_s(adapter_parameters + head_parameters),
        )

    return PaperModel(
        name,
        hidden_size,
        gpu,
        int((A6000_BYTES * 0.9 - 2 * cloud_parameters) / kv_bytes),
        (
            ("Xavier", 20, device(XAVIER_BYTES_S, XAVIER_FLOPS)),
            ("Orin", 10, device(ORIN_BYTES_S, ORIN_FLOPS)),
        ),
        tokens_a_round,
    )


VICUNA_7B = _paper_model(
    "Vicuna-7B",
    4096,
    cloud_parameters=30 * 202.4e6,
    kv_bytes=491_520,
    stage_s=6.5e-3,
    layers_parameters=2 * 202.4e6,
    adapter_parameters=67e6,
    head_parameters=131e6,
    tokens_a_round=2.06,
)
VICUNA_13B = _paper_model(
    "Vicuna-13B",
    5120,
    cloud_parameters=37 * 317.2e6,
    kv_bytes=757_760,
    stage_s=11.9e-3,
    layers_parameters=3 * 317.2e6,
    adapter_parameters=105e6,
    head_parameters=163.8e6,
    tokens_a_round=1.98,
)
