"""`hat link`: a slow link on one machine."""

from __future__ import annotations

import argparse

from hat_runtime.cli.command import Command
from hat_runtime.cli.options import parse_host_port


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Emulate a slow link: whatever connects to --listen reaches --to, at the given rate and round-trip time. "
        "All connections share the rate, as they would on a real link. Ctrl-C ends it."
    )
    parser.add_argument(
        "--listen", required=True, metavar="HOST:PORT", help="where to listen (port 0: a free one)"
    )
    parser.add_argument(
        "--to", required=True, metavar="HOST:PORT", help="the far end of the link, usually the cloud"
    )
    parser.add_argument(
        "--link",
        default="60mbit,20ms",
        metavar="RATE,RTT[,JITTER]",
        help="rate each way (kbit, mbit, gbit, or kB/s, MB/s), round-trip time (ms, s), and optionally how much "
        "each direction's delay varies (default %(default)s)",
    )


def _run(args: argparse.Namespace) -> int:
    from hat_runtime.emulation.proxy import serve
    from hat_runtime.emulation.spec import LinkSpec

    link = LinkSpec.parse(args.link)
    listen = parse_host_port(args.listen, "--listen")
    upstream = parse_host_port(args.to, "--to")

    def ready(address: str) -> None:
        print(f"hat link: {address} -> {args.to}, {link.describe()}", flush=True)

    serve(listen, upstream, link, ready)
    return 0


COMMAND = Command("link", "Emulate a slow link between device and cloud.", _configure, _run)
