"""Token mode over slow links: tokens a second without drafts, with synchronous speculation, and as PicoSpec.

    python benchmarks/picospec.py            half an hour; writes docs/benchmarks/picospec.md
    python benchmarks/picospec.py --short    two prompts, one link, to see that it works; writes nothing

GSM8K and HumanEval prompts from $HAT_DATA, greedy. Device and cloud have one core each, the emulated link is between
them. "Cloud alone" is the same server with no drafts: it decodes by itself and streams what it finds, so that a link
costs it no round trip per token. The bound of a round is max(T_draft, T_RTT + T_verify); its parts are bare passes of
both models on the same cores, and a raw socket through the link.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from common import (
    REPORTS,
    data_prompts,
    facts,
    model_folder,
    one_core_each,
    progress,
    report,
    table,
    warn_if_busy,
)

from hat_runtime.cli.completions import whole_completion
from hat_runtime.cli.limit_parts import bare_passes
from hat_runtime.cli.options import add_dtype
from hat_runtime.cli.processes import Children, exits_on_sigterm
from hat_runtime.cli.split_pair import Pair, PairConfig, running_pair
from hat_runtime.control.limits import round_bound
from hat_runtime.emulation.measure import measure_link
from hat_runtime.emulation.spec import LinkSpec
from hat_runtime.errors import HatError
from hat_runtime.model.draft_model import shipped_draft_model

FILES = {"GSM8K": "gsm8k_test.jsonl", "HumanEval": "humaneval.jsonl"}
RATE = 100e6 / 8
MOST_PROMPT_TOKENS = 400


@dataclass(frozen=True)
class Way:
    """One way to answer."""

    name: str
    max_draft: int
    window: int


@dataclass(frozen=True)
class Row:
    """One way, set of prompts and link."""

    data: str
    rtt_ms: float
    way: str
    tokens_per_s: float
    tokens_per_round: float
    acceptance: float
    round_s: float
    bound_s: float
    """Of a round; 0 where there are no rounds."""

    @property
    def share(self) -> float:
        """Of the bound that was reached."""
        return self.bound_s / self.round_s if self.round_s else 0.0


def main() -> int:
    args = _arguments()
    warn_if_busy()
    folder = model_folder(args.model)
    draft = args.draft_model or shipped_draft_model(folder)
    prompts = {name: _encoded(folder, file, args.prompts) for name, file in FILES.items()}
    seen_on = facts(folder) | {"draft model": draft.name}
    device, cloud = one_core_each()
    os.sched_setaffinity(
        0, device
    )  # the emulated link runs beside us: it must not compute on the cloud's core
    gamma = args.max_draft
    progress("measuring bare models on one core each")
    t_draft = bare_passes(draft, [1], args.dtype, device)[1]
    target = bare_passes(folder, [1, gamma], args.dtype, cloud)
    links = {rtt: LinkSpec(RATE, rtt / 1e3) for rtt in args.rtts}
    real_rtt = {rtt: measure_link(link).rtt_s for rtt, link in links.items()}
    bound = {rtt: round_bound(t_draft, gamma, seen, target[gamma]) for rtt, seen in real_rtt.items()}
    ways = (Way("cloud alone", 0, 1), Way("synchronous", gamma, 1), Way("PicoSpec", gamma, 2))
    rows: list[Row] = []
    for way in ways:
        options = ("--max-draft", str(way.max_draft), "--window", str(way.window))
        config = PairConfig(
            folder,
            next(iter(links.values())),
            dtype=args.dtype,
            device_cores=device,
            cloud_cores=cloud,
            draft_model=draft,
            speculation=options,
        )
        with exits_on_sigterm(), Children() as children, running_pair(config, children, progress) as pair:
            for rtt, link in links.items():
                assert pair.link is not None
                pair.link.set_link(link)
                for data, encoded in prompts.items():
                    row = _measure(pair, way, data, rtt, encoded, args.new_tokens, bound[rtt])
                    progress(f"{way.name}, {data}, {rtt} ms: {row.tokens_per_s:.1f} tokens/s")
                    rows.append(row)
    parts = {"t_draft": t_draft, "t_verify": target[gamma], "t_one": target[1]}
    if args.json:
        shown = [asdict(row) | {"share": row.share} for row in rows]
        print(json.dumps({"parts": parts, "rtt_s": real_rtt, "rows": shown}))
    else:
        print(_body(rows, parts, gamma))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        text = report("Token mode over slow links", _about(args), seen_on, _body(rows, parts, gamma))
        args.out.write_text(text, encoding="utf-8")
    return 0


def _encoded(folder: Path, file: str, count: int) -> list[list[int]]:
    """The first prompts of a file that are short enough, as token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encode: Callable[[str], list[int]] = lambda text: list(tokenizer(text).input_ids)  # noqa: E731
    found: list[list[int]] = []
    for prompt in data_prompts(file):
        if prompt.chat:
            message = [{"role": "user", "content": prompt.text}]
            ids = list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))
        else:
            ids = encode(prompt.text)
        if len(ids) <= MOST_PROMPT_TOKENS:
            found.append(ids)
        if len(found) == count:
            break
    return found


def _measure(
    pair: Pair, way: Way, data: str, rtt_ms: float, prompts: list[list[int]], new: int, bound_s: float
) -> Row:
    """All prompts one after the other, after one that is not counted."""
    whole_completion(pair.url, prompts[0], max_tokens=8)
    tokens = rounds = drafted = accepted = 0
    seconds = 0.0
    for ids in prompts:
        answer = whole_completion(pair.url, ids, max_tokens=new)
        figures, count = answer.figures, answer.usage["completion_tokens"]
        if count < 2:
            continue
        tokens += count - 1  # the first one is the prompt's
        seconds += figures["tbt_s"] * (count - 1)
        rounds += figures["rounds"] - 1
        drafted += figures["draft_tokens"]
        accepted += figures["accepted_tokens"]
    drafts = way.max_draft > 0
    return Row(
        data,
        rtt_ms,
        way.name,
        tokens / seconds,
        tokens / rounds if drafts else 0.0,
        accepted / drafted if drafted else 0.0,
        seconds / rounds if drafts else 0.0,
        bound_s if drafts else 0.0,
    )


def _body(rows: list[Row], parts: dict[str, float], gamma: int) -> str:
    columns = [
        "prompts",
        "RTT",
        "way",
        "tokens/s",
        "to cloud alone",
        "tokens a round",
        "accepted",
        "round",
        "bound",
    ]
    columns.append("share of the bound")
    lines = []
    for row in sorted(rows, key=lambda row: (row.data, row.rtt_ms)):
        base = next(one for one in rows if (one.data, one.rtt_ms) == (row.data, row.rtt_ms))
        line: list[object] = [row.data, f"{row.rtt_ms:g} ms", row.way, f"{row.tokens_per_s:.1f}"]
        line.append(f"{row.tokens_per_s / base.tokens_per_s:.2f}")
        if row.round_s:
            line += [f"{row.tokens_per_round:.2f}", f"{row.acceptance:.0%}", f"{row.round_s * 1e3:.0f} ms"]
            line += [f"{row.bound_s * 1e3:.0f} ms", f"{row.share:.0%}"]
        else:
            line += [""] * 5
        lines.append(line)
    detail = (
        f"Bare passes on one core: a draft {parts['t_draft'] * 1e3:.1f} ms, the large model "
        f"{parts['t_one'] * 1e3:.1f} ms for one token and {parts['t_verify'] * 1e3:.1f} ms for {gamma}."
    )
    return f"{table(columns, lines)}\n\n{detail}"


def _about(args: argparse.Namespace) -> str:
    return f"""
Greedy answers of {args.new_tokens} tokens to {args.prompts} prompts of each set, {args.dtype},
gamma = {args.max_draft}, links of 100 Mbit/s, device and cloud pinned to one core each. Absolute times depend on the
machine; ratios are of things measured in one run. "Cloud alone" streams what the same server decodes without
drafts, and pays no round trip a token. A round is a Step that was judged; the bound max(T_draft, T_RTT + T_verify) is
the paper's (arXiv 2603.19133, whose published runs reach 60 to 67 % of it), from bare passes of both models and a raw
socket through the same emulated link. "accepted" counts drafts that were thrown away behind a refusal as not accepted.
"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts", type=int, default=12, metavar="N", help="of each set (default %(default)s)"
    )
    parser.add_argument("--new-tokens", type=int, default=96, metavar="N", help="default %(default)s")
    parser.add_argument("--max-draft", type=int, default=4, metavar="N", help="gamma (default %(default)s)")
    parser.add_argument(
        "--rtts", type=float, nargs="+", default=[20, 50, 100], metavar="MS", help="default 20 50 100"
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: the default model")
    parser.add_argument("--draft-model", type=Path, metavar="FOLDER", help="default: the one made for it")
    parser.add_argument("--short", action="store_true", help="2 prompts, 32 new tokens, 50 ms, no report")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="default docs/benchmarks/picospec.md")
    add_dtype(parser)
    args = parser.parse_args()
    if args.short:
        args.prompts, args.new_tokens, args.rtts = 2, 32, [50]
    elif args.out is None:
        args.out = REPORTS / "picospec.md"
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HatError as error:
        sys.exit(f"picospec: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
