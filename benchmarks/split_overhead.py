"""What splitting costs: tokens a second through device and cloud, beside transformers' generate on the whole model.

    python benchmarks/split_overhead.py            a few minutes; writes docs/benchmarks/split_overhead.md and .svg
    python benchmarks/split_overhead.py --short    eight prompts, to see that it works; writes nothing

Device and cloud are two processes on loopback and may use the whole machine, as may the reference. The plain U-shape:
no drafts, no chunks, every token makes a round trip. Prompts are Spec-Bench questions from $HAT_DATA. Runs of the
reference and of one and eight sessions take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import (
    REPORTS,
    data_prompts,
    facts,
    metric,
    model_folder,
    progress,
    report,
    spread,
    table,
    warn_if_busy,
)
from local_generate import Local, local_model

from hat_runtime.cli.completions import Answer, stream_completion
from hat_runtime.cli.limit_parts import bare_layers
from hat_runtime.cli.options import add_dtype
from hat_runtime.cli.processes import Children, exits_on_sigterm
from hat_runtime.cli.split_pair import Pair, PairConfig, running_pair
from hat_runtime.control.limits import LimitParts, tbt_u_shape
from hat_runtime.emulation.measure import far_end, measure_rtt
from hat_runtime.errors import HatError, UsageError

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


def main() -> int:
    args = _arguments()
    warn_if_busy()
    folder = model_folder(args.model)
    candidates = _candidates(folder)
    progress("measuring bare layers")
    limit = 1 / tbt_u_shape(_parts(folder, args))
    config = PairConfig(folder, None, input_layers=args.input_layers, dtype=args.dtype)
    with (
        exits_on_sigterm(),
        Children() as children,
        running_pair(config, children, progress) as pair,
        local_model(folder, args.dtype) as local,
    ):
        results = _measure(pair, local, candidates, args, limit)
    if args.json:
        print(json.dumps({"reached": results.reached, **_as_json(results)}))
    else:
        print(_body(results))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        plot = args.out.with_suffix(".svg")
        _plot(results, plot)
        body = f"{_body(results)}\n\n![Tokens a second]({plot.name})"
        args.out.write_text(
            report("What splitting costs", _about(args), facts(folder), body), encoding="utf-8"
        )
    return 0 if results.reached else 1


def _candidates(folder: Path) -> list[list[int]]:
    """Spec-Bench questions as chat prompts, short enough that decoding dominates."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}], add_generation_prompt=True, return_dict=False
        )
        for prompt in data_prompts("spec_bench.jsonl")
    ]
    return [list(ids) for ids in encoded if len(ids) <= MOST_PROMPT_TOKENS]


def _parts(folder: Path, args: argparse.Namespace) -> LimitParts:
    """Bare layers on the whole machine; the loopback's rate is taken as unlimited."""
    bare = bare_layers(folder, args.input_layers, args.dtype, MOST_PROMPT_TOKENS)
    with far_end() as server:
        rtt = measure_rtt(server)
    return LimitParts(
        hidden_bytes=bare["hidden_bytes"],
        rate_up=float("inf"),
        rate_down=float("inf"),
        rtt=rtt,
        t_in=bare["t_in"],
        t_head=bare["t_head"],
        t_cloud=bare["t_cloud"],
        beta=bare["beta"],
        s=bare["s"],
    )


def _measure(
    pair: Pair, local: Local, candidates: list[list[int]], args: argparse.Namespace, limit: float
) -> Results:
    new = args.new_tokens

    def ask(ids: list[int]) -> Answer:
        return stream_completion(pair.url, ids, max_tokens=new, chunk_tokens=0)

    ask(candidates[0])  # not counted
    local.generate(candidates[0], new)
    local_rates, one_rates, many_rates = [], [], []
    engines: dict[str, list[Engine]] = {"one": [], "many": []}
    long_enough: list[list[int]] = []
    for ids in candidates:
        if len(long_enough) == args.prompts:
            break
        before = _engine(pair)
        answer = ask(ids)
        gained = _since(before, _engine(pair))
        if answer.finish_reason != "length":
            continue  # it ended early; the reference would, too
        reference = local.generate(ids, new)
        long_enough.append(ids)
        engines["one"].append(gained)
        one_rates.append(1 / answer.figures["tbt_s"])
        local_rates.append(1 / reference["tbt_s"])
        progress(
            f"prompt {len(long_enough)}: split {one_rates[-1]:.1f}, local {local_rates[-1]:.1f} tokens/s"
        )
        if len(long_enough) % SESSIONS == 0:
            before = _engine(pair)
            many_rates.append(_together(ask, long_enough[-SESSIONS:]))
            engines["many"].append(_since(before, _engine(pair)))
            progress(f"{SESSIONS} sessions: {many_rates[-1]:.1f} tokens/s")
    if not many_rates:
        raise UsageError(f"fewer than {SESSIONS} prompts have answers of {new} tokens; lower --new-tokens")
    return Results(local_rates, one_rates, many_rates, _sum(engines["one"]), _sum(engines["many"]), limit)


def _together(ask: Callable[[list[int]], Answer], prompts: list[list[int]]) -> float:
    """Tokens a second of sessions that start at once: all tokens but the first of each, from the first to the last."""
    spans: list[tuple[float, float, int]] = []

    def one(ids: list[int]) -> None:
        start = time.monotonic()
        answer = ask(ids)
        spans.append((start + answer.ttft_s, time.monotonic(), answer.usage["completion_tokens"]))

    threads = [threading.Thread(target=one, args=(ids,)) for ids in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(spans) < len(prompts):
        raise HatError("a session failed")
    first, last = min(span[0] for span in spans), max(span[1] for span in spans)
    return sum(span[2] - 1 for span in spans) / (last - first)


def _engine(pair: Pair) -> Engine:
    return Engine(
        metric(pair.cloud_http, "hat_engine_seconds_total"),
        metric(pair.cloud_http, "hat_forward_seconds_total"),
    )


def _since(before: Engine, after: Engine) -> Engine:
    return Engine(after.engine_s - before.engine_s, after.forward_s - before.forward_s)


def _sum(engines: list[Engine]) -> Engine:
    return Engine(sum(one.engine_s for one in engines), sum(one.forward_s for one in engines))


def _body(results: Results) -> str:
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


def _about(args: argparse.Namespace) -> str:
    return f"""
Decoding, first token excluded: {args.new_tokens} new tokens each, {args.dtype}, greedy, {args.input_layers} layers on
the device; Spec-Bench questions of at most {MOST_PROMPT_TOKENS} tokens whose answers are that long. The split model is
the plain U-shape on loopback: device and cloud are two processes on the whole machine, and every token makes a round
trip. The reference is transformers' own generate on the whole model, also on the whole machine, in turn with it.
Absolute figures depend on the machine; ratios are of things measured in one run.

The limit of one session is 1 / (t_in + R + t_c + t_h): bare transformers layers, one token at {MOST_PROMPT_TOKENS}
tokens of context, and the round trip of a byte on loopback.
"""


def _plot(results: Results, path: Path) -> None:
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


def _as_json(results: Results) -> dict[str, Any]:
    return {
        **asdict(results),
        "one_over_local": results.one_over_local,
        "many_over_one": results.many_over_one,
        "one_engine_overhead": results.one_engine.overhead,
        "many_engine_overhead": results.many_engine.overhead,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts", type=int, default=24, metavar="N", help="multiple of 8 (default %(default)s)"
    )
    parser.add_argument("--new-tokens", type=int, default=96, metavar="N", help="default %(default)s")
    parser.add_argument("--input-layers", type=int, default=3, metavar="M")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: the default model")
    parser.add_argument("--short", action="store_true", help="8 prompts, 24 new tokens, no report")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.md",
        help="where the report goes (default docs/benchmarks/split_overhead.md)",
    )
    add_dtype(parser)
    args = parser.parse_args()
    if args.short:
        args.prompts, args.new_tokens = SESSIONS, 24
    elif args.out is None:
        args.out = REPORTS / "split_overhead.md"
    if args.prompts < SESSIONS or args.prompts % SESSIONS:
        raise UsageError(f"--prompts {args.prompts}: write a multiple of {SESSIONS}")
    if args.new_tokens < 2:
        raise UsageError(f"--new-tokens {args.new_tokens}: must be at least 2")
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HatError as error:
        sys.exit(f"split_overhead: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
