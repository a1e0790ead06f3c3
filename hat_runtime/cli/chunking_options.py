"""The options that say how a device cuts prompts, for every command that sends them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hat_runtime.cli.options import auto_or_number
from hat_runtime.errors import UsageError

if TYPE_CHECKING:
    from hat_runtime.device.chunking import ChunkConfig


def add_chunking(parser: argparse.ArgumentParser) -> None:
    """--chunk-tokens, --chunk-policy and --chunk-bounds."""
    parser.add_argument(
        "--chunk-tokens",
        default="auto",
        metavar="N",
        help="tokens of a prompt that travel together; auto: chosen for each prompt from link and cloud; "
        "0: the whole prompt at once (default %(default)s)",
    )
    parser.add_argument(
        "--chunk-policy",
        default="predictive",
        metavar="NAME",
        help="how auto chooses. predictive: the least predicted time to the first token; balance: HAT's own rule, a "
        "chunk's transfer takes as long as the cloud's work on the one before it (default %(default)s)",
    )
    parser.add_argument(
        "--chunk-bounds",
        default="64:512",
        metavar="LEAST:MOST",
        help="tokens between which auto chooses (default %(default)s)",
    )


def chunking_config(args: argparse.Namespace) -> ChunkConfig:
    """The settings of a device.

    Raises:
        UsageError: names the option and echoes the value.
    """
    from hat_runtime.control.chunk_policy import Bounds
    from hat_runtime.device.chunking import ChunkConfig

    least, _, most = args.chunk_bounds.partition(":")
    try:
        bounds = Bounds(int(least), int(most))
    except ValueError:
        raise UsageError(
            f"--chunk-bounds {args.chunk_bounds!r}: must be LEAST:MOST with 1 <= LEAST <= MOST, for example 64:512"
        ) from None
    tokens = auto_or_number(args.chunk_tokens, "--chunk-tokens", int)
    return ChunkConfig(tokens, args.chunk_policy, bounds)
