"""`hat cloud serve`: the middle layers of a model for many devices."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from hat_runtime.cli import fault_options, options, picospec_options
from hat_runtime.cli.command import Command
from hat_runtime.errors import HatError, UsageError

if TYPE_CHECKING:
    from hat_runtime.control.sharing import Courtesy

DEFAULT_ADMIN = "127.0.0.1:7072"


def _configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    text = "Serve a model's middle layers to devices over gRPC."
    serve = commands.add_parser("serve", help=text, description=text)
    serve.add_argument(
        "--model", required=True, metavar="FOLDER", help="a folder made by `hat model prepare`"
    )
    serve.add_argument(
        "--input-layers",
        type=int,
        metavar="M",
        help="layers that run on the devices; this cloud runs the others "
        "(not needed for a folder that holds the cloud's part)",
    )
    picospec_options.add_mode(serve)
    serve.add_argument(
        "--listen", default="127.0.0.1:7070", metavar="HOST:PORT", help="gRPC (default %(default)s)"
    )
    serve.add_argument(
        "--http-listen",
        default="127.0.0.1:7071",
        metavar="HOST:PORT",
        help="/healthz, /readyz and /metrics; without --tls also /v1/devices and /v1/policy, to which a policy of "
        "chunk sizes can be PUT: keep it from strangers then (default %(default)s)",
    )
    options.add_tls(serve, "without --tls: listen elsewhere than on loopback all the same")
    serve.add_argument(
        "--admin-listen",
        metavar="HOST:PORT",
        help="with --tls: /v1/devices, /v1/policy and /v1/denied by HTTPS, for operators' certificates "
        f"(default {DEFAULT_ADMIN})",
    )
    serve.add_argument(
        "--denied-file",
        type=Path,
        metavar="FILE",
        help="with --tls: a deny-list to start with, JSON as PUT /v1/denied takes it; one that is missing is logged",
    )
    serve.add_argument(
        "--policy-file",
        metavar="FILE",
        help="a policy of chunk sizes to start with, JSON as PUT /v1/policy takes it; one that is missing or wrong is "
        "logged",
    )
    serve.add_argument("--device", default="auto", help="auto, cpu or cuda (default %(default)s)")
    serve.add_argument("--attention", default="sdpa", help="attention backend (default %(default)s)")
    serve.add_argument(
        "--kv-memory",
        type=float,
        metavar="GIB",
        help="KV cache in GiB (default 1 on a CPU, 80 %% of free GPU memory)",
    )
    serve.add_argument(
        "--page-tokens", type=int, default=16, help="tokens in a KV page (default %(default)s)"
    )
    serve.add_argument("--max-sessions", type=int, default=64, help="sessions at once (default %(default)s)")
    serve.add_argument(
        "--max-waiting",
        type=int,
        default=0,
        metavar="N",
        help="devices that may wait for a session when there is no place; 0: they are told at once when to try again "
        "(default %(default)s)",
    )
    serve.add_argument(
        "--tbt-target-ms",
        default="none",
        metavar="MS",
        help="let no session in with which one in twenty decoding Steps would take longer than this in the cloud. "
        "none: only --max-sessions counts (default %(default)s)",
    )
    serve.add_argument(
        "--quotas",
        metavar="FILE",
        help="limits of tenants and devices, YAML or JSON (docs/operations.md); read again when the file changes",
    )
    serve.add_argument(
        "--max-batch-tokens",
        type=int,
        default=512,
        help="tokens in one pass of the layers (default %(default)s)",
    )
    serve.add_argument(
        "--max-stretch",
        default="none",
        metavar="SHARE",
        help="how much longer the time between tokens of sessions that decode may become while prompts are computed, "
        "for example 0.25; prompts are then computed a few rows at a time. none: prompts take all that a pass has room "
        "for (default %(default)s)",
    )
    fault_options.add_cloud(serve)
    serve.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads for the layers (default: torch's choice)"
    )
    options.add_dtype(serve)
    options.add_logging(serve)
    serve.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    import asyncio

    from hat_runtime import log
    from hat_runtime.cloud.engine import EngineConfig
    from hat_runtime.cloud.scheduler import SchedulerConfig
    from hat_runtime.cloud.serve import CloudConfig, running_cloud
    from hat_runtime.log import announce
    from hat_runtime.process import spare_collector
    from hat_runtime.signals import wait_for_termination

    log.setup(args.log_level, args.log_format)
    host, port = options.parse_host_port(args.listen, "--listen")
    http_host, http_port = options.parse_host_port(args.http_listen, "--http-listen")
    if args.admin_listen is not None and args.tls is None:
        raise UsageError(f"--admin-listen {args.admin_listen} goes with --tls; without it see --http-listen")
    admin_host, admin_port = options.parse_host_port(args.admin_listen or DEFAULT_ADMIN, "--admin-listen")
    for option in ("page_tokens", "max_sessions", "max_batch_tokens", "threads"):
        options.check_positive(getattr(args, option), "--" + option.replace("_", "-"))
    fault_options.check_cloud(args)
    if args.max_waiting < 0:
        raise UsageError(f"--max-waiting {args.max_waiting}: must be 0 or more")
    config = CloudConfig(
        model=Path(args.model),
        input_layers=args.input_layers,
        mode=args.mode,
        host=host,
        port=port,
        http_host=http_host,
        http_port=http_port,
        tls=args.tls,
        admin_host=admin_host,
        admin_port=admin_port,
        denied_file=args.denied_file,
        insecure=args.insecure,
        dtype=args.dtype,
        device=args.device,
        attention=args.attention,
        page_tokens=args.page_tokens,
        kv_bytes=None if args.kv_memory is None else int(args.kv_memory * 2**30),
        max_sessions=args.max_sessions,
        max_waiting=args.max_waiting,
        tbt_target_s=_target_s(args.tbt_target_ms),
        quotas_file=None if args.quotas is None else Path(args.quotas),
        policy_file=None if args.policy_file is None else Path(args.policy_file),
        engine=EngineConfig(
            scheduler=SchedulerConfig(
                max_batch_tokens=args.max_batch_tokens, courtesy=_courtesy(args.max_stretch)
            ),
            lost_share=args.resume_share,
            threads=args.threads,
        ),
        resume_ttl_s=args.resume_ttl,
        drain_s=args.drain,
        watchdog_s=args.watchdog,
    )

    async def serve() -> None:
        async with running_cloud(config) as cloud:
            spare_collector()
            announce(
                f"hat cloud: layers {cloud.identity.lo}:{cloud.identity.hi} on {cloud.address}, "
                f"health and metrics on {cloud.http_url}"
                + (f", admin port {cloud.admin_url}" if config.tls is not None else ""),
            )
            asked = asyncio.create_task(wait_for_termination())
            await asyncio.wait((asked, cloud.broken), return_when=asyncio.FIRST_COMPLETED)
            asked.cancel()
            if cloud.broken.done():
                raise HatError(f"{cloud.broken.result()}; this cloud has ended, start it again")

    asyncio.run(serve())
    return 0


def _target_s(tbt_target_ms: str) -> float | None:
    """Of --tbt-target-ms. Raises UsageError."""
    if tbt_target_ms == "none":
        return None
    try:
        target_ms = float(tbt_target_ms)
    except ValueError:
        target_ms = -1.0
    if not 0 < target_ms < math.inf:
        raise UsageError(
            f"--tbt-target-ms {tbt_target_ms!r}: must be none or a number above 0, for example 150"
        )
    return target_ms / 1e3


def _courtesy(max_stretch: str) -> Courtesy | None:
    """Of --max-stretch. Raises UsageError."""
    from hat_runtime.control.sharing import Courtesy

    if max_stretch == "none":
        return None
    try:
        share = float(max_stretch)
    except ValueError:
        share = -1.0
    if not 0 < share < math.inf:
        raise UsageError(f"--max-stretch {max_stretch!r}: must be none or a number above 0, for example 0.25")
    return Courtesy(share)


COMMAND = Command("cloud", "Run the cloud's side: the middle layers of a model.", _configure)
