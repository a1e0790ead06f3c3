"""The simulator's tables, with the paper's figures beside."""

from __future__ import annotations

from collections.abc import Sequence

from common import table

from fleet.device import Way
from fleet.planning import Need, Target
from fleet.simulation import Outcome, Percentiles

PAPER: dict[tuple[str, float, str], tuple[float | None, float | None]] = {
    ("SpecBench", 6, "U-shape"): (646.2, 52.3),
    ("SpecBench", 6, "U-Sarathi"): (609.2, None),
    ("SpecBench", 6, "chunks of 128"): (384.0, 39.4),
    ("SpecBench", 6, "HAT, balance"): (384.2, 26.4),
    ("CNN/DM", 4, "U-shape"): (2140.8, 128.1),
    ("CNN/DM", 4, "U-Sarathi"): (1750.6, None),
    ("CNN/DM", 4, "chunks of 128"): (1038.7, 74.2),
    ("CNN/DM", 4, "HAT, balance"): (1027.4, 43.5),
}
"""(data set, requests a second, way) -> (TTFT, TBT) in ms, arXiv 2503.18989: TTFT of U-shape, U-Sarathi and HAT from
its comparison, all else from its ablation, whose request rate is not known."""
TIMES = ("mean", "50 %", "95 %", "99 %")


def compared(lengths: str, requests_s: float, seen: Sequence[tuple[Way, Outcome]]) -> str:
    """A table of ways under one load; the first one is what the others are compared with."""
    base = seen[0][1]
    rows = []
    for way, outcome in seen:
        ttft_ms, tbt_ms = PAPER.get((lengths, requests_s, way.name), (None, None))
        rows.append(
            [
                way.name,
                _ms(outcome.ttft),
                _less(outcome.ttft.mean, base.ttft.mean),
                _figure(ttft_ms),
                _ms(outcome.tbt),
                _less(outcome.tbt.mean, base.tbt.mean),
                _figure(tbt_ms),
                f"{outcome.tokens_a_round:.2f}",
                f"{outcome.chunk_tokens:.0f}" if outcome.chunk_tokens else "whole",
                f"{outcome.prediction_off:.0%}",
                f"{outcome.busy:.0%}",
            ]
        )
    columns = ["way", f"TTFT ms ({' / '.join(TIMES)})", "to U-shape", "paper's mean"]
    columns += [f"TBT ms ({' / '.join(TIMES)})", "to U-shape", "paper's mean"]
    columns += ["tokens a round", "chunk, median", "TTFT predicted, off by", "pods busy"]
    return table(columns, rows)


def needed(target: Target, rows: Sequence[tuple[Way, int, Sequence[Need]]]) -> str:
    """A table of the pods that ways need: (way, devices that a pod serves, fleets)."""
    lines: list[list[object]] = []
    for way, per_pod, needs in rows:
        if not per_pod:
            lines.append([way.name, 0, *["no number is enough"] * 4])
        lines += [
            [
                way.name,
                per_pod,
                f"{need.devices:,}",
                need.pods,
                _ms(need.outcome.ttft),
                _ms(need.outcome.answer_tbt),
            ]
            for need in needs
        ]
    columns = ["way", "devices a pod serves", "fleet", "pods"]
    columns += [f"TTFT ms ({' / '.join(TIMES)})", f"answers' TBT ms ({' / '.join(TIMES)})"]
    limits = f"{target.ttft_s:g} s to the first token, {target.tbt_s * 1e3:g} ms between tokens"
    return f"### 95 % within {limits}\n\n{table(columns, lines)}"


def _ms(times: Percentiles) -> str:
    figures = (times.mean, times.p50, times.p95, times.p99)
    return " / ".join(f"{value * 1e3:.0f}" for value in figures)


def _less(value: float, base: float) -> str:
    return f"{value / base - 1:+.0%}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
