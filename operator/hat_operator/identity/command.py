"""`hat identity`: gets this pod's certificate from the operator and keeps it fresh."""

from __future__ import annotations

import argparse

from hat_runtime.cli.command import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make a key, ask the operator for a certificate by a CertificateSigningRequest in the cluster of this pod, "
        "write tls.crt, tls.key and ca.crt for --tls, and replace them before they end, until a signal comes. The "
        "operator puts this into the pods of a HatDeployment; there is no use for it elsewhere."
    )
    parser.epilog = (
        "example: hat identity --id spiffe://hat.internal/tenant/team-a/device/jetson-1 --out /tls"
    )
    parser.add_argument(
        "--id", required=True, metavar="URI", help="who this is: spiffe://DOMAIN/tenant/TENANT/KIND/NAME"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where the files go")
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="label of the request (may be repeated)",
    )


def _run(args: argparse.Namespace) -> int:
    import logging
    import signal
    import sys
    from pathlib import Path

    from hat_operator.identity.api import Requests
    from hat_operator.identity.pod import Identity
    from hat_runtime.errors import UsageError
    from hat_runtime.security.spiffe import IdentityError, SpiffeId

    try:
        identity = SpiffeId.parse(args.id)
    except IdentityError as error:
        raise UsageError(f"--id: {error}") from error
    labels = {}
    for text in args.label:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise UsageError(f"--label {text!r}: must be KEY=VALUE")
        labels[key] = value
    folder = Path(args.out)
    if not folder.is_dir():
        raise UsageError(f"--out {args.out}: is no folder")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # The first process of a container ends by a signal only if it says so.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    Identity(identity, folder, Requests(), labels).keep()
    return 0


COMMAND = Command("identity", "get and renew this pod's certificate (on Kubernetes)", _configure, _run)
