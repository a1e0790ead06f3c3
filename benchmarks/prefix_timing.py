"""Do one tenant's waiting times tell of another's prompts? Wall times of equal and of other prefixes, over loopback.

    python benchmarks/prefix_timing.py            some minutes; writes docs/benchmarks/prefix_timing.md
    python benchmarks/prefix_timing.py --short    a few probes, to see that it works; writes nothing

A victim sends prompts; then a prober of another tenant sends, in random order, prompts that the victim has just sent
and others of the same length, each in a new session, and takes the time from its Step to the Result. The same again
with a cloud that shares prefixes on purpose (shared_prefixes.py), which must be found, or the test would prove nothing.
Server and prober are in one process, so that nothing of a network hides a difference.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from dataclasses import dataclass, field

import torch
from common import REPORTS, facts, model_folder, progress, report, table, warn_if_busy
from shared_prefixes import CountingRunner, SharingRunner, auc

from hat_runtime.cloud.serve import CloudConfig, running_cloud
from hat_runtime.device.link import CloudLink
from hat_runtime.device.steps import LAST, Binding
from hat_runtime.errors import HatError
from hat_runtime.model.split import LayerRange
from hat_runtime.wire.codec import DTYPES

INPUT_LAYERS = 3
PREFIX = 24
GOAL = 0.05
KINDS: dict[str, type[CountingRunner]] = {"HAT": CountingRunner, "prefixes shared on purpose": SharingRunner}


@dataclass
class Times:
    """Seconds from Step to Result, and the cloud's own figure of its compute."""

    known: list[float] = field(default_factory=list)
    new: list[float] = field(default_factory=list)
    known_compute: list[float] = field(default_factory=list)
    new_compute: list[float] = field(default_factory=list)


async def probe(kind: type[CountingRunner], probes: int, dtype: str) -> Times:
    """Times of `probes` prompts that the victim has sent, and of as many others."""
    folder = model_folder(None)
    config = CloudConfig(
        folder, input_layers=INPUT_LAYERS, dtype=dtype, device="cpu", kv_bytes=64 << 20, drain_s=0.1
    )
    generator, order, times = torch.Generator().manual_seed(0), random.Random(0), Times()
    async with running_cloud(config) as cloud:
        cloud.engine.runner = kind(cloud.engine.runner)
        identity = cloud.identity
        binding = Binding(
            identity.model_revision, LayerRange(identity.lo, identity.hi), DTYPES[dtype], identity.hidden_size
        )
        links = {name: CloudLink(cloud.address) for name in ("victim", "prober")}

        async def send(name: str, hidden: torch.Tensor) -> tuple[float, float]:
            session = links[name].open_session(binding, tenant=name)
            await session.opened()
            began = time.perf_counter()
            result = await session.submit(0, hidden, LAST)
            took = time.perf_counter() - began
            session.close()
            await cloud.engine.idle()
            return took, result.compute_s

        def prompt() -> torch.Tensor:
            return torch.randn(PREFIX, identity.hidden_size, generator=generator).to(DTYPES[dtype])

        try:
            for link in links.values():
                await link.describe()
            for number in range(-3, probes):
                secret = prompt()
                await send("victim", secret)
                pair = [(True, secret), (False, prompt())]
                order.shuffle(pair)
                for is_known, hidden in pair:
                    took, compute = await send("prober", hidden)
                    if number >= 0:  # the first ones are slow in any case
                        (times.known if is_known else times.new).append(took)
                        (times.known_compute if is_known else times.new_compute).append(compute)
                if number % 50 == 49:
                    progress(f"{number + 1} of {probes}")
        finally:
            for link in links.values():
                await link.close()
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--probes", type=int, default=400, help="of each kind (default %(default)s)")
    parser.add_argument("--short", action="store_true", help="10 probes; writes nothing")
    args = parser.parse_args()
    warn_if_busy()
    about = facts(model_folder(None))
    rows, found = [], {}
    try:
        for name, kind in KINDS.items():
            progress(name)
            times = asyncio.run(probe(kind, 10 if args.short else args.probes, "bfloat16"))
            found[name] = auc(times.new, times.known)
            known, new = (1e3 * statistics.median(group) for group in (times.known, times.new))
            compute = auc(times.new_compute, times.known_compute)
            row = (name, len(times.new), f"{known:.1f}", f"{new:.1f}", f"{found[name]:.3f}", f"{compute:.3f}")
            rows.append(row)
    except HatError as error:
        print(f"prefix_timing: {error}", file=sys.stderr)
        return error.exit_code
    columns = (
        "cloud",
        "probes of each",
        "known, ms",
        "new, ms",
        "AUC, wall time",
        "AUC, compute time of Results",
    )
    body = table(columns, rows)
    print(body)
    if not args.short:
        text = (
            f"How well a tenant tells by its waiting times whether another tenant has just sent the same {PREFIX} "
            "rows: AUC, 0.5 is not at all, 1 is always. Goal: 0.5 +- 0.05 for HAT, and that the same test finds a "
            "cache of prefixes that tenants share, which is built for this test only. Medians of wall times over "
            "loopback, without a link that would hide differences. In CI the same is counted in rows that the cloud "
            "computes (`tests/runtime/test_tenant_isolation.py`)."
        )
        (REPORTS / "prefix_timing.md").write_text(report("Another tenant's prefix", text, about, body))
    ok = abs(found["HAT"] - 0.5) <= GOAL and found["prefixes shared on purpose"] > 0.5 + GOAL
    return 0 if ok or args.short else 1


if __name__ == "__main__":
    sys.exit(main())
