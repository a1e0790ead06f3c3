"""`hat bench`: the papers' tables on the user's own machine, model and link."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hat_runtime.cli.command import Command
from hat_runtime.cli.options import add_dtype, check_positive
from hat_runtime.errors import UsageError

if TYPE_CHECKING:
    from hat_runtime.cli.bench.report import Result
    from hat_runtime.emulation.spec import LinkSpec

_TEXT = """\
Measure the hat suite: HAT's ablation (U-shape, + chunks, + speculation, + parallel drafting) and what goes beyond it
(pipelining, int8 uplink) over emulated links, with the limit that physics sets beside every figure. Device and cloud
get one processor core each. Nothing else should run meanwhile.

examples:
  hat bench --prompts questions.jsonl
  hat bench --prompts questions.jsonl --link 60mbit,10ms --link 20mbit,80ms --out results.md

With --out FILE.md the tables go there, the figures into FILE.json and a plot into FILE.svg (needs matplotlib).
"""
LINKS = {
    "60 Mbit/s, 10 ms (the paper's Wi-Fi)": "60mbit,10ms",
    "100 Mbit/s, 50 ms": "100mbit,50ms",
    "20 Mbit/s, 80 ms": "20mbit,80ms",
}
BALANCED = "transfer = compute"
BALANCED_RTT_S = 0.020
BALANCED_TOKENS = 1000


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = _TEXT
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--suite", choices=("hat",), default="hat", help="which tables (default %(default)s)")
    parser.add_argument(
        "--link",
        action="append",
        metavar="RATE,RTT",
        help="may be given several times; `balanced`: transfer takes as long as the cloud's compute (default: 4 links)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        action="append",
        required=True,
        metavar="FILE.jsonl",
        help="as for `hat generate`; may be given several times, the prompts are taken in turns",
    )
    parser.add_argument(
        "--limit", type=int, default=8, metavar="N", help="prompts in all (default %(default)s)"
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        default=1000,
        metavar="N",
        help="longer prompts are cut (default %(default)s)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--sessions", type=int, action="append", metavar="K", help="prompts at a time (default: 1, then 4)"
    )
    parser.add_argument("--drafter", default="auto", help="as for `hat device serve` (default %(default)s)")
    parser.add_argument(
        "--input-layers", type=int, default=3, metavar="M", help="layers on the device (default 3)"
    )
    parser.add_argument("--model", default="default", metavar="SOURCE", help="as in `hat model prepare`")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write tables, figures and plot")
    add_dtype(parser)


def _run(args: argparse.Namespace) -> int:
    for name in ("limit", "prompt_tokens", "max_new_tokens", "input_layers"):
        check_positive(getattr(args, name), "--" + name.replace("_", "-"))
    results = run_hat_suite(args)
    from hat_runtime.cli.bench import report

    print(report.as_markdown(results))
    if args.out is not None:
        write(results, args.out, report.as_markdown(results) + "\n")
    return 0


def write(results: list[Result], out: Path, text: str) -> None:
    """FILE.md, FILE.json and, where matplotlib is installed, FILE.svg."""
    from hat_runtime.cli.bench import hat_suite, report

    out.write_text(text, encoding="utf-8")
    out.with_suffix(".json").write_text(hat_suite.as_json(results) + "\n", encoding="utf-8")
    try:
        report.plot(results, out.with_suffix(".svg"))
    except ImportError:
        print("no plot: matplotlib is not installed")


def run_hat_suite(args: argparse.Namespace) -> list[Result]:
    """Measure.

    Raises:
        UsageError: an option is wrong, or the machine has one core only.
        HatError: a process ended or refused.
    """
    from hat_runtime.cli.bench.hat_suite import SuiteConfig, measure, running_stand, summarise, warm_up
    from hat_runtime.cli.bench.rows import make_rows
    from hat_runtime.cli.limit_parts import bare_layers, limit_parts
    from hat_runtime.cli.processes import Children, exits_on_sigterm
    from hat_runtime.model.drafter import find_drafter
    from hat_runtime.model.manifest import identity
    from hat_runtime.model.prepare import prepare

    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise UsageError("hat bench pins device and cloud to a core each, but only one core can be used here")
    device, cloud = frozenset({cores[0]}), frozenset({cores[1]})
    folder = prepare(args.model)
    prompts = _prompts(args, folder)
    sessions = args.sessions or [1, 4]
    kind, _, where = args.drafter.partition(":")
    file = (
        Path(where)
        if where and kind != "model"
        else find_drafter("feature", identity(folder).weights_id, args.input_layers, folder)
    )

    def say(text: str) -> None:
        print(text, flush=True)

    # The emulated link runs in this process: it must not compute on the cloud's core.
    os.sched_setaffinity(0, device)
    say("measuring bare layers on one core each")
    tokens = round(sum(map(len, prompts)) / len(prompts))
    of_device = bare_layers(folder, args.input_layers, args.dtype, tokens, device, drafter=file)
    of_cloud = bare_layers(folder, args.input_layers, args.dtype, tokens, cloud)
    links = _links(args.link, of_cloud)
    config = SuiteConfig(
        folder, make_rows(args.drafter), device, cloud, args.input_layers, args.dtype, args.max_new_tokens
    )
    results: list[Result] = []
    with (
        exits_on_sigterm(),
        Children() as children,
        running_stand(config, next(iter(links.values())), children, say) as stand,
    ):
        for name, link in links.items():
            say(f"{name}: {link.describe()}")
            stand.set_link(link)
            parts = limit_parts(of_device, of_cloud, link)
            warm_up(stand, prompts[0], args.max_new_tokens)
            for count in sessions:
                samples = measure(stand, prompts, count, args.max_new_tokens, say)
                rows = [
                    summarise(row, samples[row.name], parts, of_device["t_draft"] or parts.t_in)
                    for row in config.rows
                ]
                results.append((name, link, count, parts, rows))
    return results


def _links(wanted: list[str] | None, cloud: dict[str, float]) -> dict[str, LinkSpec]:
    from hat_runtime.emulation.spec import LinkSpec

    balanced = LinkSpec(float(f"{cloud['hidden_bytes'] / cloud['beta']:.4g}"), BALANCED_RTT_S)
    if not wanted:
        return {name: LinkSpec.parse(text) for name, text in LINKS.items()} | {BALANCED: balanced}
    return {text: balanced if text == "balanced" else LinkSpec.parse(text) for text in wanted}


def _prompts(args: argparse.Namespace, folder: Path) -> list[list[int]]:
    """Prompts of all files in turns, as token ids."""
    from hat_runtime.data import read_prompts
    from hat_runtime.device.chat import PromptEncoder
    from hat_runtime.model.hf import load_tokenizer

    encoder = PromptEncoder(load_tokenizer(folder))
    share = -(-args.limit // len(args.prompts))
    files = []
    for path in args.prompts:
        found = read_prompts(path)
        files.append(found[:: max(1, len(found) // share)][:share])
    chosen = [prompt for group in zip(*files, strict=False) for prompt in group][: args.limit]
    return [
        (
            encoder.encode_chat([{"role": "user", "content": prompt.text}])
            if prompt.chat and encoder.has_chat_template
            else encoder.encode_text(prompt.text)
        )[-args.prompt_tokens :]
        for prompt in chosen
    ]


COMMAND = Command("bench", "measure HAT against its limits on this machine", _configure, _run)
