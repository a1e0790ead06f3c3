"""`hat --help` is fast and complete, and every subcommand explains itself."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points

import pytest

from hat_runtime.cli.command import ENTRY_POINTS
from hat_runtime.cli.main import build_parser, main

COMMANDS = sorted(point.name for point in entry_points(group=ENTRY_POINTS))

IMPORTED_BY_HELP = """
import sys
from hat_runtime.cli.main import main
try:
    main(["--help"])
except SystemExit:
    pass
print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}))
"""
TOO_HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "grpc",
    "fastapi",
    "uvicorn",
    "pydantic",
    "prometheus_client",
    "rich",
}


def subcommands(parser: argparse.ArgumentParser, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield (*prefix, name)
                yield from subcommands(sub, (*prefix, name))


def test_top_level_help_names_every_command_and_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED_BY_HELP], capture_output=True, text=True, check=True, timeout=60
    )
    help_text, _, imported = done.stdout.rpartition("imported:")
    assert {"demo", "model", "cloud", "device", "generate", "link", "doctor", "top"} <= set(COMMANDS)
    for name in COMMANDS:
        assert re.search(rf"^    {name}\s", help_text, re.MULTILINE), help_text
    assert TOO_HEAVY.isdisjoint(imported.split())


@pytest.mark.parametrize("path", list(subcommands(build_parser())), ids=" ".join)
def test_every_subcommand_has_help(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*path, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: hat {' '.join(path)}")


def options(parser: argparse.ArgumentParser, prefix: str = "hat") -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from options(sub, f"{prefix} {name}")
        else:
            yield prefix, action


def test_every_argument_is_explained() -> None:
    unexplained = [
        f"{command}: {'/'.join(action.option_strings) or action.dest}"
        for command, action in options(build_parser())
        if not action.help and not (action.choices and action.option_strings)
    ]
    assert unexplained == []


def test_unknown_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["no-such-command"])
    assert ended.value.code == 2
    assert "no-such-command" in capsys.readouterr().err
