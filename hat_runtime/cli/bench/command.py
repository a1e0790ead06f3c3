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
    from hat_runtime.cli.bench.hat_rows import Row
    from hat_runtime.cli.bench.hat_suite import Prompt
    from hat_runtime.cli.bench.outcome import Outcome
    from hat_runtime.emulation.spec import LinkSpec

_TEXT = """\
Measure HAT on this machine, over emulated links. Device and cloud get one processor core each; nothing else should run
meanwhile.

--suite hat: HAT's ablation (U-shape, + chunks, + speculation, + parallel drafting) and what goes beyond it (pipelining,
int8 uplink), with the limit that physics sets beside every figure.
--suite picospec: token mode. The cloud alone, synchronous speculation and PicoSpec, in tokens a second.

examples:
  hat bench --prompts questions.jsonl
  hat bench --prompts questions.jsonl --link 60mbit,10ms --link 20mbit,80ms --out results.md
  hat bench --suite picospec --prompts maths.jsonl --prompts code.jsonl

With --out FILE.md the tables go there, the figures into FILE.json and a plot into FILE.svg (needs matplotlib).
"""
HAT, PICOSPEC = "hat", "picospec"
LINKS = {
    "60 Mbit/s, 10 ms (the paper's Wi-Fi)": "60mbit,10ms",
    "100 Mbit/s, 50 ms": "100mbit,50ms",
    "20 Mbit/s, 80 ms": "20mbit,80ms",
}
PICOSPEC_LINKS = {"20 ms": "100mbit,20ms", "50 ms": "100mbit,50ms", "100 ms": "100mbit,100ms"}
BALANCED = "transfer = compute"
BALANCED_RTT_S = 0.020
PROMPT_LENGTHS = (16, 32, 64, 96, 128, 256, 512)
"""In tokens: for these, and for the longest prompt, the limits' compute is measured."""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = _TEXT
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--suite", choices=(HAT, PICOSPEC), default=HAT, help="which tables (default %(default)s)"
    )
    parser.add_argument(
        "--link",
        action="append",
        metavar="RATE,RTT",
        help="may be given several times; suite hat: `balanced` is one on which transfer takes as long as the cloud's "
        "compute (default: hat 4 links, picospec 3 round-trip times)",
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
        "--sessions",
        type=int,
        action="append",
        metavar="K",
        help="hat: prompts at a time (default: 1, then 4)",
    )
    parser.add_argument("--drafter", help="hat: as for `hat device serve` (default auto)")
    parser.add_argument("--input-layers", type=int, metavar="M", help="hat: layers on the device (default 3)")
    parser.add_argument(
        "--row",
        action="append",
        metavar="NAME",
        help="hat: this row of the table only, as `+ both`; may be given several times (default: all)",
    )
    parser.add_argument("--max-draft", type=int, metavar="N", help="picospec: drafts of a round (default 4)")
    parser.add_argument(
        "--draft-model",
        type=Path,
        metavar="FOLDER",
        help="picospec: the small model (default: the one made for the default model)",
    )
    parser.add_argument("--model", default="default", metavar="SOURCE", help="as in `hat model prepare`")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write tables, figures and plot")
    add_dtype(parser)


def _run(args: argparse.Namespace) -> int:
    outcome = measured(args)
    print(outcome.markdown)
    if args.out is not None:
        outcome.write(args.out, outcome.markdown + "\n")
    return 0


def measured(args: argparse.Namespace) -> Outcome:
    """Run the suite.

    Raises:
        UsageError: an option is wrong or belongs to the other suite, or the machine has one core only.
        HatError: a process ended or refused.
    """
    theirs = (
        ("max_draft", "draft_model") if args.suite == HAT else ("sessions", "drafter", "input_layers", "row")
    )
    for name in theirs:
        if getattr(args, name) is not None:
            other = PICOSPEC if args.suite == HAT else HAT
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)} goes with --suite {other}")
    for name in ("limit", "prompt_tokens", "max_new_tokens", "input_layers", "max_draft"):
        if getattr(args, name) is not None:
            check_positive(getattr(args, name), "--" + name.replace("_", "-"))
    return _hat_suite(args) if args.suite == HAT else _picospec_suite(args)


def _cores() -> tuple[frozenset[int], frozenset[int]]:
    """One for the device, one for the cloud."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise UsageError("hat bench pins device and cloud to a core each, but only one core can be used here")
    return frozenset({cores[0]}), frozenset({cores[1]})


def _say(text: str) -> None:
    print(text, flush=True)


def _hat_suite(args: argparse.Namespace) -> Outcome:
    from hat_runtime.cli.bench import hat_report
    from hat_runtime.cli.bench.hat_rows import make_rows
    from hat_runtime.cli.bench.hat_suite import SuiteConfig, measure, running_stand, summarise, warm_up
    from hat_runtime.cli.limit_parts import bare_layers, bare_prompts, limit_parts
    from hat_runtime.cli.processes import Children, exits_on_sigterm
    from hat_runtime.cli.split_pair import INPUT_LAYERS
    from hat_runtime.model.drafter import find_drafter
    from hat_runtime.model.manifest import identity
    from hat_runtime.model.prepare import prepare

    device, cloud = _cores()
    drafter, input_layers = args.drafter or "auto", args.input_layers or INPUT_LAYERS
    rows = _chosen(make_rows(drafter), args.row)
    folder = prepare(args.model)
    prompts = _in_turns(_prompts(args, folder), args.limit)
    sessions = args.sessions or [1, 4]
    kind, _, where = drafter.partition(":")
    file = (
        Path(where)
        if where and kind != "model"
        else find_drafter("feature", identity(folder).weights_id, input_layers, folder)
    )

    # The emulated link runs in this process: it must not compute on the cloud's core.
    os.sched_setaffinity(0, device)
    _say("measuring bare layers on one core each")
    longest = max(len(prompt.ids) for prompt in prompts)
    of_device = bare_layers(folder, input_layers, args.dtype, longest, device, drafter=file)
    of_cloud = bare_layers(folder, input_layers, args.dtype, longest, cloud)
    lengths = [*(length for length in PROMPT_LENGTHS if length < longest), longest]
    bare = bare_prompts(folder, input_layers, lengths, args.dtype, cloud)
    links = _links(args.link, of_cloud)
    config = SuiteConfig(folder, rows, device, cloud, input_layers, args.dtype, args.max_new_tokens)
    results: list[hat_report.Result] = []
    with (
        exits_on_sigterm(),
        Children() as children,
        running_stand(config, next(iter(links.values())), children, _say) as stand,
    ):
        for name, link in links.items():
            _say(f"{name}: {link.describe()}")
            stand.set_link(link)
            parts = limit_parts(of_device, of_cloud, link, bare)
            warm_up(stand, prompts[0], args.max_new_tokens)
            for count in sessions:
                samples = measure(stand, prompts, count, args.max_new_tokens, _say)
                summaries = [
                    summarise(row, samples[row.name], parts, of_device["t_draft"] or parts.t_in)
                    for row in config.rows
                ]
                results.append((name, link, count, parts, summaries))
    return hat_report.outcome(results)


def _chosen(rows: list[Row], names: list[str] | None) -> list[Row]:
    known = [row.name for row in rows]
    for name in names or ():
        if name not in known:
            raise UsageError(f"--row {name!r}: there are {', '.join(known)}")
    return [row for row in rows if not names or row.name in names]


def _picospec_suite(args: argparse.Namespace) -> Outcome:
    from hat_runtime.cli.bench import picospec_report
    from hat_runtime.cli.bench.picospec_suite import PicospecConfig, measure
    from hat_runtime.cli.picospec_options import MAX_DRAFT
    from hat_runtime.cli.processes import exits_on_sigterm
    from hat_runtime.emulation.spec import LinkSpec
    from hat_runtime.model.draft_model import shipped_draft_model
    from hat_runtime.model.prepare import prepare

    device, cloud = _cores()
    folder = prepare(args.model)
    draft = args.draft_model or shipped_draft_model(folder)
    links = {text: text for text in args.link} if args.link else PICOSPEC_LINKS
    config = PicospecConfig(
        folder, draft, device, cloud, args.max_draft or MAX_DRAFT, args.dtype, args.max_new_tokens
    )
    with exits_on_sigterm():
        parts, rows = measure(
            config,
            {name: LinkSpec.parse(text) for name, text in links.items()},
            _prompts(args, folder),
            _say,
        )
    return picospec_report.outcome(parts, rows, config.max_draft)


def _links(wanted: list[str] | None, cloud: dict[str, float]) -> dict[str, LinkSpec]:
    from hat_runtime.emulation.spec import LinkSpec

    balanced = LinkSpec(float(f"{cloud['hidden_bytes'] / cloud['beta']:.4g}"), BALANCED_RTT_S)
    if not wanted:
        return {name: LinkSpec.parse(text) for name, text in LINKS.items()} | {BALANCED: balanced}
    return {text: balanced if text == "balanced" else LinkSpec.parse(text) for text in wanted}


def _prompts(args: argparse.Namespace, folder: Path) -> dict[str, list[list[int]]]:
    """The prompts of each file as token ids, by the file's name; the same number of each."""
    from hat_runtime.data import read_prompts
    from hat_runtime.device.chat import PromptEncoder
    from hat_runtime.model.hf import load_tokenizer

    encoder = PromptEncoder(load_tokenizer(folder))
    share = -(-args.limit // len(args.prompts))
    files: dict[str, list[list[int]]] = {}
    for path in args.prompts:
        found = read_prompts(path)
        files[path.stem] = [
            (
                encoder.encode_chat([{"role": "user", "content": prompt.text}])
                if prompt.chat and encoder.has_chat_template
                else encoder.encode_text(prompt.text)
            )[-args.prompt_tokens :]
            for prompt in found[:: max(1, len(found) // share)][:share]
        ]
    return files


def _in_turns(files: dict[str, list[list[int]]], limit: int) -> list[Prompt]:
    from hat_runtime.cli.bench.hat_suite import Prompt  # torch-free, but the command's module stays light

    turns = zip(*([Prompt(ids, name) for ids in found] for name, found in files.items()), strict=False)
    return [prompt for group in turns for prompt in group][:limit]


COMMAND = Command("bench", "measure HAT against its limits on this machine", _configure, _run)
