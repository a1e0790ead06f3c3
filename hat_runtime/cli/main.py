"""The `hat` command."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import entry_points

from hat_runtime import __version__
from hat_runtime.cli.command import ENTRY_POINTS, Command
from hat_runtime.errors import HatError
from hat_runtime.process import tune_libraries

EXIT_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of `hat` with every installed subcommand."""
    parser = argparse.ArgumentParser(
        prog="hat",
        description="HAT splits a language model between a device and a cloud: the device keeps the text, "
        "the cloud does most of the work, and only hidden states cross the network.",
    )
    parser.add_argument("--version", action="version", version=f"hat {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        command: Command = point.load()
        sub = commands.add_parser(command.name, help=command.help, description=command.help)
        command.configure(sub)
        if command.run is not None:
            sub.set_defaults(run=command.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `hat` and return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    tune_libraries()
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except HatError as error:
        print(f"hat: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("hat: interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    return code


if __name__ == "__main__":
    sys.exit(main())
