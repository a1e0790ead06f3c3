"""The options that say how a device drafts, for every command that generates text."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hat_runtime.cli.options import auto_or_number

if TYPE_CHECKING:
    from hat_runtime.device.policy import DraftConfig


def add_drafting(parser: argparse.ArgumentParser) -> None:
    """--drafter, --max-draft, --stop-threshold, --window, --branches, --alternatives and --sampler."""
    parser.add_argument(
        "--drafter",
        default="auto",
        metavar="NAME",
        help="what guesses tokens ahead: adapter or feature (trained for the model and the split by `hat "
        "train-drafter`; NAME:FILE takes a file), ngram (what followed the same words before), hybrid (ngram or the "
        "trained one, whichever is likelier right), model:FOLDER (a small model with the same tokenizer), none, or "
        "auto: hybrid where a trained drafter is found, else ngram (default %(default)s)",
    )
    parser.add_argument(
        "--max-draft",
        type=int,
        metavar="N",
        help="most guesses in a round (default 6; with --mode picospec 4, and 0: the cloud decodes by itself)",
    )
    parser.add_argument(
        "--stop-threshold",
        default="auto",
        metavar="P",
        help="a round's guesses end with one of less confidence (0 to 1); auto: when one more is not worth its time "
        "on this link (default %(default)s)",
    )
    parser.add_argument(
        "--window",
        default="auto",
        metavar="N",
        help="rounds that may be under way at once; auto: as many as pay, with --mode picospec 2 (default %(default)s)",
    )
    parser.add_argument(
        "--branches",
        type=int,
        default=1,
        metavar="K",
        help="candidates for the token behind a round that are drafted on while the round is checked; 0: "
        "the device waits meanwhile (default %(default)s)",
    )
    parser.add_argument(
        "--alternatives",
        default="auto",
        metavar="N",
        help="other candidates for each guess that the cloud checks along with it, so that a wrong guess need not end "
        "the round; auto: those that are worth their time, 0: none. Not with the sampler rejection, nor --mode "
        "picospec (default %(default)s)",
    )
    parser.add_argument(
        "--sampler",
        default="coupled",
        metavar="NAME",
        help="for temperatures above 0. coupled: a seed gives the text that it gives without drafting; rejection: more "
        "guesses are accepted, and only the distribution is the same. --mode picospec has coupled, thinning (exact in "
        "distribution) and topk (the paper's, which is not exact) (default %(default)s)",
    )


def drafting_config(args: argparse.Namespace) -> DraftConfig:
    """The settings of a device.

    Raises:
        UsageError: names the option and echoes the value.
    """
    from hat_runtime.device.drafting.factory import check_name
    from hat_runtime.device.policy import DraftConfig

    if args.mode != "hat":
        return DraftConfig()  # token mode drafts in its own way
    check_name(args.drafter)
    return DraftConfig(
        max_draft=6 if args.max_draft is None else args.max_draft,
        stop_threshold=auto_or_number(args.stop_threshold, "--stop-threshold", float),
        window=auto_or_number(args.window, "--window", int),
        branches=args.branches,
        alternatives=auto_or_number(args.alternatives, "--alternatives", int),
        sampler=args.sampler,
    )
