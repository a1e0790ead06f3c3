"""What split_overhead.py measured, and how it is shown."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import spread, table

ONE_GOAL, MANY_GOAL, ENGINE_GOAL = 0.9, 2.5, 0.10
"""One session over the reference; all sessions over one; the engine's share of a step outside the layers."""
SESSIONS = 8
MOST_PROMPT_TOKENS = 250
COLUMNS = ["", "tokens/s, median", "10 to 90 %", "ratio", "goal"]


@dataclass(frozen=True)
class Engine:
    """What the cloud's counters gained during a run."""

    engine_s: float
    forward_s: float

    @property
    def overhead(self) -> float:
        """Share of the steps' time that is not the layers'."""
        return 1 - self.forward_s / self.engine_s


@dataclass(frozen=True)
class Results:
    """Everything measured; rates in tokens a second, one for each prompt or round."""

    local: list[float]
    one: list[float]
    many: list[float]
    one_engine: Engine
    many_engine: Engine
    limit: float
    """One session at most, from bare layers on this machine and the loopback's round trip."""

    @property
    def one_over_local(self) -> float:
        """Median over prompts of the ratio of two runs side by side."""
        return statistics.median(one / local for one, local in zip(self.one, self.local, strict=True))

    @property
    def many_over_one(self) -> float:
        """Medians."""
        return statistics.median(self.many) / statistics.median(self.one)

    @property
    def reached(self) -> bool:
        """All goals."""
        engines = (self.one_engine, self.many_engine)
        return (
            self.one_over_local >= ONE_GOAL
            and self.many_over_one >= MANY_GOAL
            and all(engine.overhead < ENGINE_GOAL for engine in engines)
        )


def body(results: Results) -> str:
    """The tables."""

    def rate(name: str, rates: list[float], ratio: str = "", goal: str = "") -> list[str]:
        low, middle, high = spread(rates)
        return [name, f"{middle:.1f}", f"{low:.1f} to {high:.1f}", ratio, goal]

    one = f"{results.one_over_local:.2f} x local"
    many = f"{results.many_over_one:.2f} x one session"
    reached = statistics.median(results.one) / results.limit
    rows = [
        rate("transformers generate, whole model", results.local),
        rate("split, one session", results.one, one, f"{ONE_GOAL:g}"),
        rate(f"split, {SESSIONS} sessions together", results.many, many, f"{MANY_GOAL:g}"),
        ["limit of one session", f"{results.limit:.1f}", "", f"{reached:.2f} of it reached", ""],
    ]
    engines = [("one session", results.one_engine), (f"{SESSIONS} sessions", results.many_engine)]
    shares = [[name, f"{engine.overhead:.1%}", f"< {ENGINE_GOAL:.0%}"] for name, engine in engines]
    verdict = "reached" if results.reached else "NOT reached"
    return "\n\n".join(
        [
            table(COLUMNS, rows),
            "The engine's time outside the layers (planning, packing, handing over), as a share of its steps:",
            table(["", "share", "goal"], shares),
            f"Goals: {verdict}.",
        ]
    )


def about(args: argparse.Namespace) -> str:
    """How it was measured."""
    return f"""
Decoding, first token excluded: {args.new_tokens} new tokens each, {args.dtype}, greedy, {args.input_layers} layers on
the device; Spec-Bench questions of at most {MOST_PROMPT_TOKENS} tokens whose answers are that long. The split model is
the plain U-shape on loopback: device and cloud are two processes on the whole machine, and every token makes a round
trip. The reference is transformers' own generate on the whole model, also on the whole machine, in turn with it.
Absolute figures depend on the machine; ratios are of things measured in one run.

The limit of one session is 1 / (t_in + R + t_c + t_h): bare transformers layers, one token at {MOST_PROMPT_TOKENS}
tokens of context, and the round trip of a byte on loopback.
"""


def plot(results: Results, path: Path) -> None:
    """Write the bars as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hat"  # the same figures give the same file
    import matplotlib.pyplot as plt

    names = ["transformers\ngenerate", "split,\none session", f"split,\n{SESSIONS} sessions"]
    spreads = [spread(rates) for rates in (results.local, results.one, results.many)]
    errors = [[middle - low for low, middle, _ in spreads], [high - middle for _, middle, high in spreads]]
    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    medians = [middle for _, middle, _ in spreads]
    axis.bar(names, medians, yerr=errors, capsize=4, width=0.6, color=["#909090", "#4878a8", "#4878a8"])
    axis.hlines(results.limit, 0.6, 1.4, color="#c04020", linewidth=2, label="limit of one session")
    axis.set_ylabel("tokens a second")
    axis.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def as_json(results: Results) -> dict[str, Any]:
    """All figures."""
    return {
        **asdict(results),
        "one_over_local": results.one_over_local,
        "many_over_one": results.many_over_one,
        "one_engine_overhead": results.one_engine.overhead,
        "many_engine_overhead": results.many_engine.overhead,
    }
