"""`hat top`: how devices do now, in a terminal."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hat_runtime.cli.command import Command

if TYPE_CHECKING:
    from hat_runtime.cli.top_watch import Watch

EXAMPLES = """\
examples:
  hat top
  hat top --url http://192.168.1.20:8000 --url http://192.168.1.21:8000
  hat top --once --json
"""

DEFAULT_URL = "http://127.0.0.1:8000"
LEAST_INTERVAL_S = 0.1


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description = (
        "Show what devices are doing: time to first token, time between tokens, chunk size, link rate, round-trip time "
        "and acceptance, each with its latest values as a line, and whether the cloud answers. Ctrl-C ends it."
    )
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--url",
        action="append",
        metavar="URL",
        help=f"where `hat device serve` listens; may be given several times (default {DEFAULT_URL})",
    )
    parser.add_argument(
        "--interval",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds between two looks (default %(default)s)",
    )
    parser.add_argument(
        "--once", action="store_true", help="look once and end; exit code 1 if a device did not answer"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object a look: what each device's /v1/hat/stats said",
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="where the devices ask for a key: its first line is sent to all of them",
    )


def run(args: argparse.Namespace) -> int:
    """Look, once or until Ctrl-C."""
    from hat_runtime.cli.top_watch import Watch, read_key
    from hat_runtime.errors import UsageError

    if not args.interval >= LEAST_INTERVAL_S:
        raise UsageError(f"--interval {args.interval:g}: must be at least {LEAST_INTERVAL_S:g} seconds")
    key = None if args.api_key_file is None else read_key(args.api_key_file)
    with Watch(args.url or [DEFAULT_URL], key) as watch:
        if args.once:
            watch.look()
            _print(watch, as_json=args.json)
            return 0 if all(device.error is None for device in watch.devices) else 1
        try:
            if not args.json and sys.stdout.isatty():
                _live(watch, args.interval)
            while True:
                watch.look()
                _print(watch, as_json=args.json)
                time.sleep(args.interval)
        except KeyboardInterrupt:  # the way to end it
            return 0


def _print(watch: Watch, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"devices": [device.as_json() for device in watch.devices]}), flush=True)
        return
    from rich.console import Console

    from hat_runtime.cli.top_view import view

    console = Console(highlight=False)
    console.print(view(watch.devices, console.width))


def _live(watch: Watch, interval_s: float) -> None:
    from rich.console import Console
    from rich.live import Live

    from hat_runtime.cli.top_view import view

    console = Console(highlight=False)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            watch.look()
            live.update(view(watch.devices, console.width), refresh=True)
            time.sleep(interval_s)


COMMAND = Command("top", "show what devices are doing, in the terminal", configure, run)
