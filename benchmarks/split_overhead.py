"""What splitting costs: tokens a second through device and cloud, beside transformers' generate on the whole model.

    python benchmarks/split_overhead.py            a few minutes; writes docs/benchmarks/split_overhead.md and .svg
    python benchmarks/split_overhead.py --short    eight prompts, to see that it works; writes nothing

Device and cloud are two processes on loopback and may use the whole machine, as may the reference. The plain U-shape:
no drafts, no chunks, every token makes a round trip; both give their
answers whole, not streamed. Prompts are Spec-Bench questions from $HAT_DATA. Runs of the reference and of one and
eight sessions take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from common import (
    REPORTS,
    data_prompts,
    facts,
    metric,
    model_folder,
    progress,
    report,
    warn_if_busy,
)
from local_generate import Local, local_model
from split_report import MOST_PROMPT_TOKENS, SESSIONS, Engine, Results, about, as_json, body, plot

from hat_runtime.cli.completions import Answer, whole_completion
from hat_runtime.cli.limit_parts import bare_layers
from hat_runtime.cli.options import add_dtype
from hat_runtime.cli.processes import Children, exits_on_sigterm
from hat_runtime.cli.split_pair import Pair, PairConfig, running_pair
from hat_runtime.control.limits import LimitParts, tbt_u_shape
from hat_runtime.emulation.measure import far_end, measure_rtt
from hat_runtime.errors import HatError, UsageError


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
        print(json.dumps({"reached": results.reached, **as_json(results)}))
    else:
        print(body(results))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        picture = args.out.with_suffix(".svg")
        plot(results, picture)
        page = f"{body(results)}\n\n![Tokens a second]({picture.name})"
        text = report("What splitting costs", about(args), facts(folder), page)
        args.out.write_text(text, encoding="utf-8")
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
        return whole_completion(pair.url, ids, max_tokens=new, chunk_tokens=0)

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
        spans.append((start + answer.figures["ttft_s"], time.monotonic(), answer.usage["completion_tokens"]))

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
