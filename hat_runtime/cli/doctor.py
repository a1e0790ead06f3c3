"""`hat doctor`: can this device work with that cloud? Says what to fix."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hat_runtime.cli.command import Command
from hat_runtime.cli.options import add_dtype, add_tls, parse_host_port
from hat_runtime.security.exposure import check_dialled
from hat_runtime.security.spiffe import DEVICE

if TYPE_CHECKING:
    from hat_runtime.device.link import CloudLink
    from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
    from hat_runtime.security.folder import Material, TlsFolder


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    ok: bool
    text: str
    fix: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--cloud", required=True, metavar="HOST:PORT", help="where `hat cloud serve` listens")
    add_tls(parser, "reach a cloud that is not on loopback without --tls")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="also compare this model folder with what the cloud serves",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="longest wait (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")
    add_dtype(parser)


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if one of them is a failure."""
    import asyncio

    from hat_runtime.security.folder import TlsFolder

    parse_host_port(args.cloud, "--cloud")
    check_dialled(args.cloud, args.tls, insecure=args.insecure)
    tls = None if args.tls is None else TlsFolder(args.tls, DEVICE)
    findings = asyncio.run(examine(args.cloud, args.model, args.dtype, args.timeout, tls))
    healthy = all(finding.ok for finding in findings)
    if args.json:
        print(json.dumps({"ok": healthy, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name:15} {finding.text}")
            if not finding.ok:
                print(f"{'':22}fix: {finding.fix}")
    return 0 if healthy else 1


async def examine(
    cloud: str, model: Path | None, dtype: str, timeout_s: float = 10.0, tls: TlsFolder | None = None
) -> list[Finding]:
    """All findings, in the order in which they depend on each other; the first failure to reach the cloud ends it.

    Args:
        cloud: "HOST:PORT".
        model: folder to compare, or None.
        dtype: compute dtype that this device would use.
        timeout_s: longest wait for one answer.
        tls: certificates; None: without TLS.
    """
    from hat_runtime.device.link import CloudLink
    from hat_runtime.device.refusals import DeviceForbidden
    from hat_runtime.errors import CloudUnavailable, HandshakeError

    link = CloudLink(cloud, timeout_s=timeout_s, tls=tls)
    certificate = [] if tls is None else [_certificate(tls.current())]
    try:
        try:
            description = await link.describe()
        except CloudUnavailable as error:
            fix = f"start `hat cloud serve` there, or correct --cloud {cloud}; look for a firewall between"
            return [*certificate, Finding("reachable", False, str(error), fix)]
        except DeviceForbidden as error:
            fix = "let the cloud's operator look at its deny-list and at the tenant of this device's certificate"
            return [
                *certificate,
                Finding("reachable", True, cloud),
                Finding("allowed", False, str(error), fix),
            ]
        except HandshakeError as error:
            fix = "give the gRPC port of a HAT cloud of the same major version"
            return [
                *certificate,
                Finding("reachable", True, cloud),
                Finding("protocol", False, str(error), fix),
            ]
        findings = [*certificate, Finding("reachable", True, cloud), *_software(description)]
        findings += await _link(link)
        findings += [_pages(description), await _session(link, description)]
        if model is not None:
            findings += await _model(model, description, dtype)
        return findings
    finally:
        await link.close()


def _certificate(material: Material) -> Finding:
    end = material.certificate.not_valid_after_utc
    reason = material.why_not_valid()
    text = f"{material.identity}, " + (reason or f"good until {end:%Y-%m-%d %H:%M:%S} UTC")
    return Finding("certificate", reason is None, text, "have it renewed, or correct this machine's clock")


def _software(description: pb.DescribeReply) -> list[Finding]:
    from hat_runtime import __version__
    from hat_runtime.device.link import PROTOCOL_MAJOR, PROTOCOL_MINOR

    served, limits = description.model, description.limits
    return [
        Finding(
            "protocol",
            True,
            f"{description.protocol_major}.{description.protocol_minor} in the cloud, "
            f"{PROTOCOL_MAJOR}.{PROTOCOL_MINOR} here",
        ),
        Finding("version", True, f"hat-platform {description.software} in the cloud, {__version__} here"),
        Finding(
            "serves",
            True,
            f"layers {served.lo}:{served.hi} in {served.dtype}, weights {served.weights_id[:12]}; up to "
            f"{limits.max_sessions} sessions of {limits.max_tokens} tokens",
        ),
    ]


async def _link(link: CloudLink) -> list[Finding]:
    rtt = await link.measure_rtt()
    rate = await link.measure_rate()
    return [
        Finding("round trip", True, f"{rtt * 1e3:.1f} ms"),
        Finding("rate", True, f"{rate.up * 8 / 1e6:.1f} Mbit/s up, {rate.down * 8 / 1e6:.1f} Mbit/s down"),
    ]


def _pages(description: pb.DescribeReply) -> Finding:
    pages = description.pages
    text = f"{pages.free} of {pages.total} pages of {pages.page_tokens} tokens are free"
    # Idle sessions give their pages up, so a full cache is no failure: the cloud decides when a session asks.
    return Finding("page budget", pages.total > 0, text, "give the cloud memory for a KV cache")


async def _session(link: CloudLink, description: pb.DescribeReply) -> Finding:
    """Open a session and end it."""
    from hat_runtime.device.steps import Binding
    from hat_runtime.errors import HatError
    from hat_runtime.model.split import LayerRange
    from hat_runtime.wire.codec import DTYPES

    cloud, codec = description.model, description.codecs[0]
    layers, dtype = LayerRange(cloud.lo, cloud.hi), DTYPES[cloud.dtype]
    mode = "" if description.mode == "hat" else description.mode
    binding = Binding(cloud.model_revision, layers, dtype, cloud.hidden_size, codec, codec, mode)
    session = link.open_session(binding)
    try:
        await session.opened()
    except HatError as error:
        return Finding(
            "session", False, str(error), "look at the cloud's log; a full or draining one needs time"
        )
    finally:
        session.close()
    kept = f"kept for {session.resume_s:g} s after a lost connection"
    return Finding("session", True, f"opens; {kept if session.resume_s else 'ends with its connection'}")


async def _model(folder: Path, description: pb.DescribeReply, dtype: str) -> list[Finding]:
    import asyncio

    from hat_runtime.device.handshake import compare
    from hat_runtime.errors import ModelError
    from hat_runtime.model.manifest import identity
    from hat_runtime.wire.codec import DTYPES

    try:
        manifest = await asyncio.to_thread(identity, folder)
        comparisons = compare(manifest, folder, description, DTYPES[dtype])
    except ModelError as error:
        return [Finding("model", False, str(error), f"prepare {folder} with `hat model prepare`")]
    return [
        Finding(
            item.name,
            item.agree,
            f"{_short(item.device)} here, {_short(item.cloud)} in the cloud",
            "" if item.agree else item.fix,
        )
        for item in comparisons
    ]


def _short(value: str) -> str:
    return f"{value[:12]}..." if len(value) == 64 else value


COMMAND = Command("doctor", "check that this device and a cloud fit together", configure, run)
