"""What a subcommand of `hat` is. Packages offer theirs in the entry-point group "hat.commands"."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

ENTRY_POINTS = "hat.commands"


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Its module is imported for every `hat --help`: heavy imports (torch, transformers, grpc) belong inside `run`.
    """

    name: str
    help: str
    """One line for `hat --help`."""
    configure: Callable[[argparse.ArgumentParser], None]
    """Adds the arguments, or sub-subcommands that set `run` by set_defaults."""
    run: Callable[[argparse.Namespace], int] | None = None
    """Does the work and returns the exit code; HatError and Ctrl-C are handled by the caller."""
