"""`hat audit inversion`: how much of a text hidden states give away."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hat_runtime.cli.command import Command
from hat_runtime.cli.options import add_dtype, check_positive
from hat_runtime.cli.progress import ProgressBar
from hat_runtime.errors import HatError, UsageError
from hat_runtime.wire.codec_choice import CODECS

ALL = "all"
ATTACKERS = ("embedding", "pairs", "weights", "head")
"""As hat_runtime.audit.attacks.KNOWLEDGE, which needs torch."""

_TEXT = """\
Attack this model as those can who see what crosses the network, and count the tokens that they recover. Everything
runs here: no device, no cloud.

what the attacker has (--knowledge):
  embedding   the embedding table: takes the nearest embedding. Finds little, and proves nothing
  pairs       pairs (token, state) of a device of the fleet, and no weights: a linear probe
  weights     all weights: tries tokens until the state is the one seen. This is the cloud's operator
  head        final norm and head: reads answers from deep states

Prompts are JSON lines, as for `hat generate`; only the user's own tokens count, not the chat template's. A table
with the share of the tokens recovered, and of the texts recovered whole, goes to standard output.

example:
  hat audit inversion --model ./smollm2 --codec all
"""


def _configure(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="audits", metavar="AUDIT", required=True)
    inversion = kinds.add_parser(
        "inversion", help="how much of a text hidden states give away", description=_TEXT
    )
    inversion.formatter_class = argparse.RawDescriptionHelpFormatter
    _configure_inversion(inversion)
    inversion.set_defaults(run=_run)


def _configure_inversion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the whole model, as `hat model prepare` writes it",
    )
    parser.add_argument(
        "--input-layers", type=int, default=3, metavar="M", help="layers on the device (default %(default)s)"
    )
    parser.add_argument(
        "--codec",
        default=ALL,
        metavar="NAME[,NAME]",
        help=f"codecs of the uplink: {', '.join(CODECS)}, or all (default)",
    )
    parser.add_argument(
        "--knowledge",
        default=ALL,
        metavar="NAME[,NAME]",
        help=f"what the attacker has: {', '.join(ATTACKERS)}, or all (default)",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE.jsonl", help="texts to recover (default: eight that HAT brings)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    parser.add_argument(
        "--max-prompt-tokens",
        type=int,
        default=512,
        metavar="N",
        help="longer prompts are left out (default %(default)s)",
    )
    parser.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE.jsonl",
        help="texts of the attacker's own device; random tokens follow where they are too short (default: those alone)",
    )
    parser.add_argument(
        "--pair-counts",
        default="1000,10000",
        metavar="N[,N]",
        help="pairs that the attacker has (default %(default)s)",
    )
    parser.add_argument(
        "--answer-tokens", type=int, default=16, metavar="N", help="of each answer (default %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of answers and random tokens (default %(default)s)"
    )
    add_dtype(parser, "float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, with seconds a token")


def _run(args: argparse.Namespace) -> int:
    table, figures = run_inversion(args)
    print(table)
    if args.json is not None:
        try:
            args.json.write_text(json.dumps(figures, indent=1) + "\n")
        except OSError as error:
            raise HatError(f"--json {args.json}: {error.strerror}") from error
    return 0


def run_inversion(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """Check the options and audit: the Markdown tables, and the figures for JSON.

    Raises:
        UsageError: names the option and echoes the value.
    """
    names = {
        "codecs": _names(args.codec, "--codec", CODECS),
        "knowledge": _names(args.knowledge, "--knowledge", ATTACKERS),
    }
    counts = _counts(args.pair_counts)
    for option in ("limit", "max_prompt_tokens", "answer_tokens"):
        check_positive(getattr(args, option), f"--{option.replace('_', '-')}")
    with ProgressBar() as progress:
        return _measured(args, names, counts, progress)


def _measured(
    args: argparse.Namespace, names: dict[str, tuple[str, ...]], pair_counts: tuple[int, ...], progress: Any
) -> tuple[str, list[dict[str, Any]]]:
    import torch

    from hat_runtime.audit.inversion import Inversion, InversionOptions
    from hat_runtime.audit.report import as_json, table, timings
    from hat_runtime.audit.subject import Subject
    from hat_runtime.audit.texts import DEFAULT_PROMPTS, encode
    from hat_runtime.data import read_prompts
    from hat_runtime.device.chat import PromptEncoder
    from hat_runtime.model.hf import load_tokenizer

    texts = read_prompts(args.prompts or DEFAULT_PROMPTS, None)
    encoder = PromptEncoder(load_tokenizer(args.model))
    short = [
        pair for pair in (encode(text, encoder) for text in texts) if len(pair[0]) <= args.max_prompt_tokens
    ]
    prompts = short[: args.limit]
    if not prompts:
        raise UsageError(
            f"--max-prompt-tokens {args.max_prompt_tokens}: all {len(texts)} prompts have more tokens than that"
        )
    own = [] if args.pairs is None else [encode(text, encoder)[0] for text in read_prompts(args.pairs)]
    room = sum(len(ids) + args.answer_tokens + 2 * 16 for ids, _ in prompts) + 8192
    subject = Subject.load(args.model, args.input_layers, getattr(torch, args.dtype), room)
    options = InversionOptions(
        names["codecs"],
        names["knowledge"],
        pair_counts=pair_counts,
        answer_tokens=args.answer_tokens,
        seed=args.seed,
    )
    figures = Inversion(subject, options, prompts, own, progress).run()
    about = (
        f"{args.model.name}, {args.input_layers} layers on the device, {args.dtype}: {len(prompts)} prompts with "
        f"{sum(len(ids[secret]) for ids, secret in prompts)} tokens of their users, answers of {args.answer_tokens}."
    )
    return f"{about}\n\n{table(figures)}\n\n{timings(figures)}", as_json(figures)


def _names(value: str, option: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = known if value == ALL else tuple(value.split(","))
    for name in names:
        if name not in known:
            raise UsageError(f"{option} {value!r}: {name!r} is none of {', '.join(known)}, {ALL}")
    if len(set(names)) != len(names):
        raise UsageError(f"{option} {value!r}: a name is given twice")
    return names


def _counts(value: str) -> tuple[int, ...]:
    counts = tuple(int(part) if part.isdigit() else 0 for part in value.split(","))
    if min(counts) < 2:
        raise UsageError(
            f"--pair-counts {value!r}: write whole numbers of 2 or more, with commas between them"
        )
    return counts


COMMAND = Command("audit", "how much of a text an attacker recovers from hidden states", _configure)
