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
    """--draft-model. How to speculate with it is said by the options of drafting (drafting_options.py)."""
    parser.add_argument(
        "--draft-model",
        type=Path,
        metavar="FOLDER",
        help="picospec: a small whole model with the same vocabulary, which drafts on this device (default: the one "
        "made for the default model)",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse what does not go together, before anything is imported or loaded.

    Raises:
        UsageError: names the option and echoes its value.
    """
    if args.mode != "picospec":
        if args.draft_model is not None:
            raise UsageError(f"--draft-model {args.draft_model} goes with --mode picospec")
        return
    for option, value, default in (
        ("--drafter", args.drafter, "auto"),
        ("--stop-threshold", args.stop_threshold, "auto"),
        ("--branches", args.branches, 1),
        ("--alternatives", args.alternatives, "auto"),
    ):
        if value != default:
            raise UsageError(f"{option} {value} does not go with --mode picospec")
    if getattr(args, "pad_frames", False):  # `hat bench` has no such option
        raise UsageError("--pad-frames does not go with --mode picospec: token ids are no rows")
    if args.sampler not in SAMPLERS:
        raise UsageError(f"--sampler {args.sampler!r}: --mode picospec has {', '.join(SAMPLERS)}")
    drafts, window = _or(args.max_draft, MAX_DRAFT), _window(args)
    if drafts < 0:
        raise UsageError(f"--max-draft {drafts}: must be 0 or more")
    if window < 1:
        raise UsageError(f"--window {window}: must be 1 or more")
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

    if args.mode != "picospec":
        return SpeculationConfig()
    return SpeculationConfig(
        max_draft=_or(args.max_draft, MAX_DRAFT),
        window=_window(args),
        sampler=args.sampler,
    )


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _window(args: argparse.Namespace) -> int:
    if args.window == "auto":
        return WINDOW
    try:
        return int(args.window)
    except ValueError:
        raise UsageError(f"--window {args.window!r}: must be auto or a number") from None
