"""`hat pki`: certificates for hosts without Kubernetes."""

from __future__ import annotations

import argparse
from pathlib import Path

from hat_runtime.cli.command import Command

EXAMPLES = """\
examples:
  hat pki init --out ca --trust-domain home.example
  hat pki issue --ca ca --cloud cloud-1 --out cloud-tls
  hat pki issue --ca ca --cloud cloud-2 --tenant sales --also support research --out cloud-2-tls
  hat pki issue --ca ca --device jetson-1 --out jetson-1-tls --hours 720
  hat cloud serve --tls cloud-tls ...
  hat device serve --tls jetson-1-tls ...

ca/ca.key signs for everybody: keep it where neither cloud nor device runs. Issue into a new folder and move
its files over the old ones before they expire: they are read again without a restart.
"""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "An authority of your own, and certificates for --tls. Keys are ECDSA P-256, have mode 0600 and are never "
        "overwritten."
    )
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    text = "Make an authority."
    init = commands.add_parser("init", help=text, description=text)
    init.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="gets ca.crt and ca.key")
    init.add_argument(
        "--trust-domain",
        required=True,
        metavar="DOMAIN",
        help="stands in every identity, like a DNS name: home.example",
    )
    init.set_defaults(run=_init)
    text = "Make a key and a certificate for it."
    issue = commands.add_parser("issue", help=text, description=text)
    issue.add_argument(
        "--ca", type=Path, required=True, metavar="FOLDER", help="the authority, made by `hat pki init`"
    )
    who = issue.add_mutually_exclusive_group(required=True)
    for kind, help_text in (
        ("device", "for `hat device serve`, `hat generate` and `hat doctor`"),
        ("cloud", "for `hat cloud serve`"),
        ("operator", "for whoever reads and writes the cloud's admin port"),
    ):
        who.add_argument(f"--{kind}", metavar="NAME", help=help_text)
    issue.add_argument("--tenant", default="default", help="whose it is (default %(default)s)")
    issue.add_argument(
        "--also",
        nargs="+",
        default=(),
        metavar="TENANT",
        help="further tenants that a cloud serves; it keeps them apart and shares its time fairly between them",
    )
    issue.add_argument(
        "--hours", type=float, default=24.0, metavar="N", help="how long it is good for (default %(default)g)"
    )
    issue.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="gets tls.crt, tls.key and ca.crt"
    )
    issue.set_defaults(run=_issue)


def _init(args: argparse.Namespace) -> int:
    from hat_runtime.security.pki import Authority

    authority = Authority.create(args.trust_domain)
    authority.save(args.out)
    end = authority.certificate.not_valid_after_utc
    print(f"hat pki: {args.out} holds an authority for {args.trust_domain}, good until {end:%Y-%m-%d}")
    return 0


def _issue(args: argparse.Namespace) -> int:
    from datetime import timedelta

    from hat_runtime.errors import UsageError
    from hat_runtime.security.pki import Authority
    from hat_runtime.security.spiffe import KINDS

    kind, name = next((kind, getattr(args, kind)) for kind in KINDS if getattr(args, kind) is not None)
    try:
        lifetime = timedelta(hours=args.hours)
    except (ValueError, OverflowError):
        raise UsageError(f"--hours {args.hours}: must be a number of hours") from None
    issued = Authority.load(args.ca).issue(args.tenant, kind, name, lifetime=lifetime, also=args.also)
    issued.save(args.out)
    end = issued.certificate.not_valid_after_utc
    print(
        f"hat pki: {args.out} is for {issued.identity}, serial {issued.certificate.serial_number:x}, "
        f"good until {end:%Y-%m-%d %H:%M:%S} UTC"
    )
    return 0


COMMAND = Command("pki", "Make certificates for devices and clouds without Kubernetes.", _configure)
