"""Small simulated fleets with round figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests import benchmark_modules  # noqa: F401  (first: it makes `fleet` importable)

from fleet.costs import DeviceCost, Gpu  # isort: skip
from fleet.device import LinkRates, Way  # isort: skip
from fleet.simulation import Outcome, simulate  # isort: skip
from fleet.workload import Request  # isort: skip

from hat_runtime.control.pass_cost import PassCost

HIDDEN = 1000
ROW_BYTES = 2 * HIDDEN
DEVICE = DeviceCost(PassCost(0.0, 1e-4), PassCost(2e-3, 0.0), 3e-3)
CLOUD = Gpu(weights_s=0.015, row_s=2e-4, cached_token_s=0.0, overhead_s=0.0)
LINK = LinkRates(4e6, 8e6, 0.02)


def one_device(way: Way, request: Request, link: LinkRates = LINK, **changes: Any) -> Outcome:
    """What a device alone sees."""
    values = {"clouds": [CLOUD], "kv_tokens": 1 << 14, "devices": [(DEVICE, link)], "hidden_size": HIDDEN}
    return simulate(way, [replace(request, device=0)], **(values | changes))
