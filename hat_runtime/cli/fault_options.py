"""Options about lost connections, drains and failures, of `hat cloud serve` and of a device."""

from __future__ import annotations

import argparse
import math

from hat_runtime.errors import UsageError


def add_cloud(parser: argparse.ArgumentParser) -> None:
    """Add those of a cloud."""
    parser.add_argument(
        "--resume-ttl",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long a session is kept after its stream was lost, so that the device can go on where it was; 0: not "
        "at all (default %(default)g)",
    )
    parser.add_argument(
        "--resume-share",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="most of the KV cache that such sessions keep together, 0 to 1; others take it when they need it (default "
        "%(default)g)",
    )
    parser.add_argument(
        "--drain",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="what running answers get to end after SIGTERM or Ctrl-C, before they move to another replica (default "
        "%(default)g)",
    )
    parser.add_argument(
        "--watchdog",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="a pass of the layers that takes longer counts as stuck: the cloud says so and ends with an error; 0: "
        "never (default %(default)g)",
    )


def check_cloud(args: argparse.Namespace) -> None:
    """Raises UsageError, which names the option and echoes its value."""
    for option in ("resume_ttl", "drain", "watchdog"):
        _check_seconds(getattr(args, option), "--" + option.replace("_", "-"))
    if not 0 <= args.resume_share <= 1:
        raise UsageError(f"--resume-share {args.resume_share:g}: must be between 0 and 1")


def add_reconnect_for(parser: argparse.ArgumentParser) -> None:
    """Add --reconnect-for."""
    parser.add_argument(
        "--reconnect-for",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long an answer tries to reach the cloud again after it lost it, before it ends with an error; 0: not "
        "at all (default %(default)g)",
    )


def check_reconnect_for(args: argparse.Namespace) -> None:
    """Raises UsageError, which names the option and echoes its value."""
    _check_seconds(args.reconnect_for, "--reconnect-for")


def _check_seconds(value: float, option: str) -> None:
    if not 0 <= value < math.inf:
        raise UsageError(f"{option} {value:g}: must be 0 or more seconds")
