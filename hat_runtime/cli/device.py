"""`hat device serve`: the device's half of the model, behind an OpenAI-compatible API."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hat_runtime.cli import fault_options, picospec_options
from hat_runtime.cli.chunking_options import add_chunking, chunking_config
from hat_runtime.cli.command import Command
from hat_runtime.cli.drafting_options import add_drafting, drafting_config
from hat_runtime.cli.options import (
    add_dtype,
    add_logging,
    add_pad_frames,
    add_tls,
    add_uplink_codec,
    check_positive,
    parse_host_port,
    parse_uplink_codec,
)

EXAMPLES = """\
examples:
  hat device serve --model ./smollm2 --cloud 127.0.0.1:7070
  hat device serve --model ./smollm2 --cloud 10.0.0.5:7070 --tls ./tls --listen 0.0.0.0:8000 --api-key-file keys.txt
  hat device serve --mode picospec --draft-model ./small --model ./smollm2 --cloud 10.0.0.5:7070 --tls ./tls
  hat device serve --mode picospec --model ./smollm2 --cloud 10.0.0.5:7070 --tls ./tls --offline draft-only

Then talk to it with any OpenAI client whose base URL is http://HOST:PORT/v1.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add `serve` and its options."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    serve = actions.add_parser(
        "serve",
        help="serve an OpenAI-compatible API",
        description="Load the device's part of a model (embedding, first layers, head; the cloud says how many "
        "layers), connect to the cloud and serve an OpenAI-compatible API.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="model folder, as written by `hat model prepare`",
    )
    serve.add_argument("--cloud", required=True, metavar="HOST:PORT", help="where `hat cloud serve` listens")
    serve.add_argument(
        "--listen",
        default="127.0.0.1:8000",
        metavar="HOST:PORT",
        help="where to serve the API; elsewhere than on loopback it needs --api-key-file (default %(default)s)",
    )
    add_tls(
        serve,
        "reach a cloud that is not on loopback without --tls, and serve the API elsewhere without --api-key-file",
    )
    add_chunking(serve)
    add_drafting(serve)
    picospec_options.add_mode(serve)
    picospec_options.add_speculation(serve)
    add_dtype(serve)
    add_uplink_codec(serve)
    add_pad_frames(serve)
    serve.add_argument(
        "--device", default="auto", help="where the layers run: auto, cpu or cuda (default %(default)s)"
    )
    serve.add_argument(
        "--kv-tokens",
        type=int,
        default=32768,
        metavar="N",
        help="tokens that all conversations on this device may hold together (default %(default)s)",
    )
    serve.add_argument(
        "--model-name", metavar="NAME", help="the model's name in the API (default: the folder's name)"
    )
    serve.add_argument(
        "--device-name",
        default=os.environ.get("HAT_DEVICE_NAME", ""),
        metavar="NAME",
        help="name under which the cloud lists this device at /v1/devices (default: $HAT_DEVICE_NAME; without one it "
        "is not listed)",
    )
    serve.add_argument(
        "--max-concurrent",
        type=int,
        default=8,
        metavar="N",
        help="answers generated at once (default %(default)s)",
    )
    serve.add_argument(
        "--max-waiting",
        type=int,
        default=32,
        metavar="N",
        help="answers that may wait for their turn; more are refused with status 429 (default %(default)s)",
    )
    serve.add_argument(
        "--keep-sessions",
        type=int,
        default=4,
        metavar="N",
        help="answered conversations that stay open, so that the next turn sends only its new tokens "
        "(default %(default)s)",
    )
    fault_options.add_reconnect_for(serve)
    serve.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="keys that clients must send as `Authorization: Bearer KEY`, one a line, # for comments; "
        "read again when they change (default: none needed)",
    )
    serve.add_argument(
        "--grace",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="time that running answers get to finish after SIGTERM or Ctrl-C (default %(default)s)",
    )
    serve.add_argument(
        "--offline",
        choices=("refuse", "draft-only"),
        default="refuse",
        help="what new requests get while the cloud is away. refuse: status 503, to be tried again; draft-only: the "
        "small model of --mode picospec or --drafter model:FOLDER answers alone, and every such answer is marked "
        "(default %(default)s)",
    )
    add_logging(serve)
    serve.set_defaults(run=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    from hat_runtime import http, log
    from hat_runtime.errors import UsageError
    from hat_runtime.log import sane_device_name

    log.setup(args.log_level, args.log_format)
    parse_host_port(args.cloud, "--cloud")
    check_positive(args.kv_tokens, "--kv-tokens")
    codecs = parse_uplink_codec(args.uplink_codec)
    if args.keep_sessions < 0:
        raise UsageError(f"--keep-sessions {args.keep_sessions}: must be 0 or more")
    if args.device_name and sane_device_name(args.device_name) is None:
        raise UsageError(
            f"--device-name {args.device_name!r}: only letters, digits, '.', '_' and '-', at most 253 of them"
        )
    picospec_options.check(args)
    fault_options.check_reconnect_for(args)
    host, port = parse_host_port(args.listen, "--listen")
    http.bind(host, port, "--listen").close()  # a busy port is told before seconds of imports

    import asyncio
    import math

    from hat_runtime.device.generator import GeneratorConfig
    from hat_runtime.device.recovery import RecoveryConfig
    from hat_runtime.device.serve import DeviceConfig, serve_device

    config = DeviceConfig(
        model=args.model,
        mode=args.mode,
        draft_model=picospec_options.draft_folder(args),
        speculation=picospec_options.speculation(args),
        cloud=args.cloud,
        listen_host=host,
        listen_port=port,
        dtype=args.dtype,
        codecs=codecs,
        device=args.device,
        kv_tokens=args.kv_tokens,
        model_name=args.model_name,
        max_concurrent=args.max_concurrent,
        max_waiting=args.max_waiting,
        api_key_file=args.api_key_file,
        tls=args.tls,
        insecure=args.insecure,
        grace_s=args.grace,
        offline=args.offline,
        cloud_wait_s=math.inf,
        drafter=args.drafter,
        generator=GeneratorConfig(
            max_idle_conversations=args.keep_sessions,
            device_name=args.device_name,
            recovery=RecoveryConfig(reconnect_for_s=args.reconnect_for),
            pad_frames=args.pad_frames,
            chunking=chunking_config(args),
            drafting=drafting_config(args),
        ),
    )
    asyncio.run(serve_device(config))
    return 0


COMMAND = Command("device", "the device side: `hat device serve`", configure)
