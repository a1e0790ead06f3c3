"""Arguments that several subcommands share, and what their values mean."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hat_runtime.errors import UsageError
from hat_runtime.wire.codec_choice import CODECS, CodecChoice

T = TypeVar("T", int, float)


def add_dtype(parser: argparse.ArgumentParser, default: str = "bfloat16") -> None:
    """--dtype float32|bfloat16."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default=default,
        help=f"number format for the computation (default {default}; both sides must use the same)",
    )


def add_uplink_codec(parser: argparse.ArgumentParser) -> None:
    """--uplink-codec PROMPT[,DECODE]; `parse_uplink_codec` reads it."""
    parser.add_argument(
        "--uplink-codec",
        default="raw",
        metavar="PROMPT[,DECODE]",
        help=f"how hidden states travel to the cloud: {', '.join(CODECS)}. One name is for prompts, and all other "
        "states stay raw: they are few, so decoding is bound by round trips, not by bytes. All but raw change the "
        "model that is sampled: docs/usage.md (default raw)",
    )


def add_pad_frames(parser: argparse.ArgumentParser) -> None:
    """--pad-frames."""
    parser.add_argument(
        "--pad-frames",
        action="store_true",
        help="fill frames up to fixed sizes both ways, so that their sizes do not tell who watches the network "
        "how many tokens were drafted; costs bytes: docs/benchmarks/padding.md",
    )


def parse_uplink_codec(value: str) -> CodecChoice:
    """The value of --uplink-codec. Raises UsageError, which echoes it and lists the codecs."""
    return CodecChoice.parse(value, "--uplink-codec")


def add_tls(parser: argparse.ArgumentParser, insecure: str) -> None:
    """--tls and --insecure; `insecure` says what the latter allows."""
    parser.add_argument(
        "--tls",
        type=Path,
        metavar="DIR",
        help="mutual TLS with tls.crt, tls.key and ca.crt of this folder, which are read again when they change: "
        "docs/operations.md, Certificates",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        default=os.environ.get("HAT_INSECURE") == "1",
        help=f"{insecure} (also by the environment: HAT_INSECURE=1)",
    )


def add_logging(parser: argparse.ArgumentParser) -> None:
    """--log-level and --log-format."""
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    parser.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="one line of text or of JSON"
    )


def parse_host_port(value: str, option: str) -> tuple[str, int]:
    """ "HOST:PORT" -> (host, port); port 0 asks for a free one.

    Raises:
        UsageError: names `option` and echoes the value.
    """
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{option}: {value!r} is not HOST:PORT (for example 127.0.0.1:7070)")
    return host.strip("[]"), int(port)


def check_positive(value: int | None, option: str) -> None:
    """Raise UsageError unless `value` is None or at least 1."""
    if value is not None and value < 1:
        raise UsageError(f"{option} {value}: write 1 or more")


def auto_or_number(value: str, option: str, kind: Callable[[str], T]) -> T | None:
    """None for auto, else the number.

    Args:
        value: what was given.
        option: its name, for the error.
        kind: int or float.

    Raises:
        UsageError: it is neither.
    """
    if value == "auto":
        return None
    try:
        return kind(value)
    except ValueError:
        raise UsageError(f"{option} {value!r}: must be auto or a number") from None
