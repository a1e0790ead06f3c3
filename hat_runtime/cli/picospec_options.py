"""The options of token mode (PicoSpec), for every command that has it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hat_runtime.errors import UsageError

if TYPE_CHECKING:
    from hat_runtime.device.token_answer import SpeculationConfig

MODES = ("hat", "picospec")
SAMPLERS = ("coupled", "thinning", "topk")
MAX_DRAFT = 4
WINDOW = 2
MOST_DRAFTS = 64
"""Drafts that may be under way: each is a row of the cloud's pass, most of which a refusal throws away."""


def add_mode(parser: argparse.ArgumentParser) -> None:
    """--mode hat|picospec."""
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="hat",
        help="hat: the model is split and hidden states cross the network; picospec: a small model on the device "
        "drafts for the whole model in the cloud, and token ids cross the network (default %(default)s)",
    )


def add_speculation(parser: argparse.ArgumentParser) -> None:
    """--draft-model and how to speculate with it."""
    parser.add_argument(
        "--draft-model",
        type=Path,
        metavar="FOLDER",
        help="picospec: a small whole model with the same vocabulary, which drafts on this device (default: the one "
        "made for the default model)",
    )
    parser.add_argument(
        "--max-draft",
        type=int,
        metavar="N",
        help=f"picospec: drafts of a round; 0: none, the cloud decodes by itself (default {MAX_DRAFT})",
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="picospec: rounds that may be drafted and not judged; 1: no drafting while a round is judged "
        f"(default {WINDOW})",
    )
    parser.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="picospec, above temperature 0: coupled (the text is that of the large model and the seed) and thinning "
        "are exact, topk is the paper's and is not (default coupled)",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse what does not go together, before anything is imported or loaded.

    Raises:
        UsageError: names the option and echoes its value.
    """
    given = {"--draft-model": args.draft_model, "--max-draft": args.max_draft}
    given |= {"--window": args.window, "--sampler": args.sampler}
    if args.mode != "picospec":
        for option, value in given.items():
            if value is not None:
                raise UsageError(f"{option} {value} goes with --mode picospec")
        return
    if args.max_draft is not None and args.max_draft < 0:
        raise UsageError(f"--max-draft {args.max_draft}: must be 0 or more")
    if args.window is not None and args.window < 1:
        raise UsageError(f"--window {args.window}: must be 1 or more")
    drafts, window = _or(args.max_draft, MAX_DRAFT), _or(args.window, WINDOW)
    if drafts * window > MOST_DRAFTS:
        raise UsageError(
            f"--max-draft {drafts} x --window {window} are {drafts * window} drafts under way; at most {MOST_DRAFTS}"
        )


def draft_folder(args: argparse.Namespace) -> Path | None:
    """The draft model; None in the other mode.

    Raises:
        UsageError: none was named, and there is none for this model.
    """
    if args.mode != "picospec":
        return None
    if args.draft_model is not None:
        named: Path = args.draft_model
        return named
    from hat_runtime.model.draft_model import shipped_draft_model

    return shipped_draft_model(args.model)


def speculation(args: argparse.Namespace) -> SpeculationConfig:
    """What the options say."""
    from hat_runtime.device.token_answer import SpeculationConfig

    return SpeculationConfig(
        max_draft=_or(args.max_draft, MAX_DRAFT),
        window=_or(args.window, WINDOW),
        sampler=args.sampler or SAMPLERS[0],
    )


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
