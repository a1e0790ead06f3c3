"""Mutual TLS between real processes' parts: who gets in, who does not and is told why, and who is put out again."""

from __future__ import annotations

import asyncio
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from cryptography.hazmat.primitives.serialization import Encoding
from starlette.types import Message, Receive, Scope, Send

from hat_runtime.cli.doctor import examine
from hat_runtime.cli.main import main
from hat_runtime.cloud.access import Access
from hat_runtime.cloud.admin import operators_only
from hat_runtime.cloud.peer import Peer
from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.device.link import CloudLink
from hat_runtime.device.refusals import DeviceForbidden
from hat_runtime.errors import CloudUnavailable, HatError, UsageError
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.security.folder import TlsFolder
from hat_runtime.security.https import EXTENSION
from hat_runtime.security.spiffe import CLOUD, DEVICE, OPERATOR, SpiffeId
from hat_runtime.security.tls import server_credentials
from tests.certificates import Site, expired, for_both_sides, of_tomorrow
from tests.runtime.raw_client import LocalSplit, RawSession, open_session, opening
from tests.runtime.secured import admin, channel_as, secured_cloud

DENIED = grpc.StatusCode.PERMISSION_DENIED


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def stranger(tmp_path: Path) -> Site:
    """Another authority that claims the same names."""
    root = tmp_path / "stranger"
    root.mkdir()
    return Site(root)


async def refusal(cloud: RunningCloud | str, tls: TlsFolder | None) -> HatError:
    """What a device is told that comes with `tls`."""
    link = CloudLink(cloud if isinstance(cloud, str) else cloud.address, tls=tls, timeout_s=5)
    try:
        with pytest.raises(HatError) as failure:
            await link.describe()
        return failure.value
    finally:
        await link.close()


@asynccontextmanager
async def impostor(tls: Path, kind: str) -> AsyncIterator[str]:
    """Somebody who listens with a certificate that is good, but not for that."""
    server = grpc.aio.server()
    port = server.add_secure_port("127.0.0.1:0", server_credentials(TlsFolder(tls, kind)))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def test_a_device_with_a_certificate_gets_in(tiny_llama: Path, site: Site) -> None:
    async with secured_cloud(tiny_llama, site) as cloud, channel_as(cloud, site.device()) as stub:
        session = await open_session(stub, cloud)
        shallow = LocalSplit(tiny_llama).shallow(torch.arange(5, 9))
        await session.step(0, shallow)
        assert len((await session.result()).payload) == 4 * 64 * 4
        status, found = await admin(cloud, "/v1/devices", site.operator())
        assert status == 200
        assert [row["name"] for row in found["devices"]] == ["jetson-1"]
        findings = await examine(cloud.address, tiny_llama, "float32", tls=site.device_folder())
        assert all(finding.ok for finding in findings)
        assert findings[0].text.startswith("spiffe://site.example/tenant/acme/device/jetson-1, good until")


async def test_strangers_to_a_cloud(tiny_llama: Path, site: Site, stranger: Site) -> None:
    async with secured_cloud(tiny_llama, site) as cloud:
        for tls, words in (
            (None, "if the cloud runs with --tls, this side needs --tls too"),
            (site.device_folder(**expired()), r"this device's certificate, spiffe://\S+, expired at 20"),
            (site.device_folder(**of_tomorrow()), r"certificate, spiffe://\S+, is not valid before 20"),
            (stranger.device_folder(), "was not signed by an authority in ca.crt"),
            (site.device_folder(tenant="other"), "not a cloud of tenant 'other' of site.example"),
        ):
            error = await refusal(cloud, tls)
            assert isinstance(error, CloudUnavailable)
            assert re.search(words, str(error)), error
        # One that knows the cloud's authority, but whom another one has signed.
        false = stranger.device()
        (false / "ca.crt").write_bytes((site.device() / "ca.crt").read_bytes())
        error = await refusal(cloud, TlsFolder(false, DEVICE))
        assert "the cloud does not accept the certificate of spiffe://" in str(error)
        # Nobody with a cloud's certificate comes as a device: not by its usage nor, were that to do, by its name.
        async with channel_as(cloud, site.cloud("cloud-2"), CLOUD) as stub:
            with pytest.raises(grpc.aio.AioRpcError, match="Socket closed"):
                await stub.Describe(pb.DescribeRequest(), timeout=5)
        both = site.root / "both"
        for_both_sides(site.issue(CLOUD, "cloud-3"), site.authority).save(both)
        async with channel_as(cloud, both, CLOUD) as stub:
            with pytest.raises(grpc.aio.AioRpcError, match="cloud/cloud-3 is no device") as failure:
                await stub.Describe(pb.DescribeRequest(), timeout=5)
            assert failure.value.code() is DENIED
            code, details = await refused(cloud, RawSession(stub.Session()))
            assert code is DENIED
            assert "is no device" in details


async def refused(cloud: RunningCloud, session: RawSession, **fields: Any) -> tuple[grpc.StatusCode, str]:
    """How a stream ends that is opened so."""
    await session.send(opening(cloud, **fields))
    return await session.end()


async def test_a_device_of_another_tenant(tiny_llama: Path, site: Site) -> None:
    """One that would take any cloud: the cloud looks for itself."""
    mine, foreign = site.device(), site.issue(DEVICE, "jetson-9", "other")
    async with secured_cloud(tiny_llama, site) as cloud:
        options = [("grpc.ssl_target_name_override", "hat-cloud.hat.internal")]
        path = site.root / "foreign"
        foreign.save(path)
        material = TlsFolder(path, DEVICE).current()
        credentials = grpc.ssl_channel_credentials(material.authorities, material.key, material.chain)
        async with grpc.aio.secure_channel(cloud.address, credentials, options=options) as channel:
            call = channel.unary_unary("/hat.v1.Runtime/Describe")
            with pytest.raises(grpc.aio.AioRpcError, match="is not of tenant 'acme'") as failure:
                await call(b"", timeout=5)
        assert failure.value.code() is DENIED
        assert (await admin(cloud, "/v1/policy", site.operator(tenant="other")))[0] == 403
        assert (await admin(cloud, "/v1/policy", mine))[0] == 403


async def test_a_cloud_of_several_tenants_keeps_them_apart(tiny_llama: Path, site: Site) -> None:
    """Sessions, quotas and the admin port; who is served stands in the cloud's certificate."""
    quotas = site.root / "quotas.yaml"
    quotas.write_text("tenants: {other: {sessions: 1}}")
    tls = site.cloud(also=["other"])
    shallow = LocalSplit(tiny_llama).shallow(torch.arange(5, 25))
    # Both devices have the same name: tenants do not know of one another.
    async with (
        secured_cloud(tiny_llama, site, tls, quotas_file=quotas) as cloud,
        channel_as(cloud, site.device()) as acme,
        channel_as(cloud, site.device(tenant="other")) as other,
    ):
        kept = RawSession(acme.Session())
        await kept.send(opening(cloud, resumable=True))
        session_id = (await kept.call.read()).opened.session_id
        sessions = [kept, *[await open_session(stub, cloud) for stub in (acme, other)]]
        code, text = await refused(cloud, RawSession(other.Session()))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "tenant 'other' has all sessions that its quota sessions=1 gives" in text
        theirs = {"resumable": True, "resume": pb.Resume(session_id=session_id)}
        code, text = await refused(cloud, RawSession(other.Session()), **theirs)
        assert (code, text) == (
            grpc.StatusCode.NOT_FOUND,
            f"session {session_id!r} is unknown, or is kept no longer",
        )
        for session in sessions:
            await session.step(0, shallow[:10])
            await session.result()
        third = site.device_folder(tenant="third")
        assert "not a cloud of tenant 'third'" in str(await refusal(cloud, third))
        for tenant, status in (("acme", 200), ("other", 403)):
            assert (await admin(cloud, "/v1/policy", site.operator(tenant=tenant)))[0] == status


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda site, _: site.cloud(**expired()), "the cloud's certificate has expired"),
        (lambda site, _: site.cloud(**of_tomorrow()), "the cloud's certificate is not valid yet"),
        (lambda _, stranger: stranger.cloud(), "was not signed by an authority in ca.crt of --tls"),
        (lambda site, _: site.cloud(tenant="other"), "is not a cloud of tenant 'acme' of site.example"),
    ],
)
async def test_clouds_that_a_device_does_not_take(
    site: Site, stranger: Site, make: Callable[[Site, Site], Path], words: str
) -> None:
    async with impostor(make(site, stranger), CLOUD) as address:
        assert words in str(await refusal(address, site.device_folder()))


async def test_a_device_is_no_cloud(site: Site) -> None:
    both = site.root / "both"
    for_both_sides(site.issue(DEVICE, "jetson-2"), site.authority).save(both)
    for tls, words in (
        (site.device("jetson-3"), "is not a cloud: "),
        (both, "is not a cloud of tenant 'acme'"),
    ):
        async with impostor(tls, DEVICE) as address:
            assert words in str(await refusal(address, site.device_folder()))
    with pytest.raises(UsageError, match="device/jetson-1, which is no cloud"):
        async with running_cloud(CloudConfig(site.root, tls=site.device())):
            pass


async def test_a_plain_cloud_is_told_apart(tiny_llama: Path, site: Site) -> None:
    async with running_cloud(CloudConfig(tiny_llama, 2, dtype="float32", kv_bytes=1 << 24)) as cloud:
        assert "there is no TLS at this address" in str(await refusal(cloud, site.device_folder()))


async def test_open_says_nothing_else_than_the_certificate(tiny_llama: Path, site: Site) -> None:
    async with secured_cloud(tiny_llama, site) as cloud, channel_as(cloud, site.device()) as stub:
        for said in ({}, {"tenant": "acme"}, {"device": "jetson-1"}):
            await open_session(stub, cloud, **said)
        for field, said, certified in (("tenant", "other", "acme"), ("device", "jetson-2", "jetson-1")):
            code, text = await refused(cloud, RawSession(stub.Session()), **{field: said})
            assert code is DENIED
            assert text == f"Open.{field}: {said!r} is not the certificate's {certified!r}"


@pytest.mark.parametrize("by", ["identity", "serial"])
async def test_a_device_that_is_denied_while_it_is_connected(tiny_llama: Path, site: Site, by: str) -> None:
    device, other, operator = site.device(), site.device("jetson-2"), site.operator()
    material = TlsFolder(device, DEVICE).current()
    serial = ":".join(f"{byte:02X}" for byte in material.certificate.serial_number.to_bytes(20, "big"))
    entry = str(material.identity) if by == "identity" else serial
    shallow = LocalSplit(tiny_llama).shallow(torch.arange(5, 25))
    async with (
        secured_cloud(tiny_llama, site) as cloud,
        channel_as(cloud, device) as stub,
        channel_as(cloud, other) as other_stub,
    ):
        session, kept = await open_session(stub, cloud), await open_session(other_stub, cloud)
        for one in (session, kept):
            await one.step(0, shallow[:10])
            await one.result()
        pages = cloud.engine.runner.cache
        held = pages.num_pages - pages.free_pages
        status, reply = await admin(cloud, "/v1/denied", operator, {"version": 1, "denied": [entry]})
        assert (status, reply["version"], len(reply["denied"])) == (200, 1, 1)
        assert await session.end() == (DENIED, f"{material.identity} is on the deny-list")
        await cloud.engine.idle()
        assert pages.num_pages - pages.free_pages == held // 2
        code, details = await refused(cloud, RawSession(stub.Session()))
        assert (code, details) == (DENIED, f"{material.identity} is on the deny-list")
        error = await refusal(cloud, TlsFolder(device, DEVICE))
        assert isinstance(error, DeviceForbidden)
        assert "does not let this device in" in str(error)
        await kept.step(10, shallow[10:])
        await kept.result()
        # Whoever is denied by name stays so with the next certificate, and comes back with the next list.
        renewed = TlsFolder(site.device(), DEVICE)
        if by == "identity":
            assert isinstance(await refusal(cloud, renewed), DeviceForbidden)
        assert (await admin(cloud, "/v1/denied", operator, {"version": 2, "denied": []}))[0] == 200
        await open_session(stub, cloud)


async def test_the_admin_port_is_for_operators(tiny_llama: Path, site: Site, stranger: Site) -> None:
    operator, start = site.operator(), site.root / "denied.json"
    start.write_text('{"version": 5, "denied": ["ff"]}')
    async with secured_cloud(tiny_llama, site, denied_file=start) as cloud:
        assert await admin(cloud, "/v1/denied", operator) == (200, {"version": 5, "denied": ["ff"]})
        policy = {"version": 1, "devices": {}}
        assert await admin(cloud, "/v1/policy", operator, policy) == (200, policy)
        for body, status, field, value in (
            ({"version": 5, "denied": []}, 409, "version", "5"),
            ({"version": 6, "denied": [1]}, 400, "denied[0]", "1"),
        ):
            code, reply = await admin(cloud, "/v1/denied", operator, body)
            assert (code, reply["error"]["field"], reply["error"]["value"]) == (status, field, value)
        for who in (site.device(), site.operator(tenant="other")):
            for path in ("/v1/devices", "/v1/policy", "/v1/denied", "/healthz"):
                code, reply = await admin(cloud, path, who)
                assert code == 403
                assert reply["error"]["value"].startswith("spiffe://site.example/tenant/")
            assert (await admin(cloud, "/v1/denied", who, {"version": 9, "denied": []}))[0] == 403
        false = stranger.operator()
        (false / "ca.crt").write_bytes((operator / "ca.crt").read_bytes())
        for who in (None, false, site.operator(**expired()), site.cloud("cloud-2")):
            with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
                await admin(cloud, "/v1/denied", who)
        serial = TlsFolder(operator, "operator").current().certificate.serial_number
        await admin(cloud, "/v1/denied", operator, {"version": 6, "denied": [f"{serial:x}"]})
        assert (await admin(cloud, "/v1/denied", operator))[0] == 403
        plain = dict.fromkeys(("/healthz", "/readyz", "/metrics"), 200)
        plain |= dict.fromkeys(("/v1/devices", "/v1/policy", "/v1/denied"), 404)
        assert {path: await _status(cloud.http_url + path) for path in plain} == plain


async def _status(url: str) -> int:
    def ask() -> int:
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    return await asyncio.to_thread(ask)


async def test_streams_end_with_the_certificate_of_their_connection(tiny_llama: Path, site: Site) -> None:
    async with (
        secured_cloud(tiny_llama, site) as cloud,
        channel_as(cloud, site.device(lifetime=timedelta(seconds=5))) as stub,
    ):
        session = await open_session(stub, cloud)
        code, details = await session.end()
        assert code is grpc.StatusCode.ABORTED
        assert "the certificate of this connection expired at" in details
        with pytest.raises(grpc.aio.AioRpcError, match="expired at"):
            await stub.Describe(pb.DescribeRequest(), timeout=5)


def test_the_same_device_with_another_certificate_is_the_same_peer() -> None:
    identity = SpiffeId("site.example", "acme", DEVICE, "jetson-1")
    one = Peer("acme", "jetson-1", True, identity, serial=1)
    assert one == Peer("acme", "jetson-1", True, identity, serial=2)
    foreign = SpiffeId("site.example", "other", DEVICE, "jetson-1")
    assert one != Peer("other", "jetson-1", True, foreign, serial=1)
    assert one != Peer("acme", "jetson-1")


def test_without_tls_loopback_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, prompts = str(tmp_path), tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello"}\n')
    for words, message in (
        (
            ["cloud", "serve", "--listen", "0.0.0.0:0"],
            "--listen 0.0.0.0:0 is not loopback: it needs --tls DIR",
        ),
        (["cloud", "serve", "--http-listen", "0.0.0.0:0"], "--http-listen 0.0.0.0:0 is not loopback"),
        (["cloud", "serve", "--denied-file", "x"], "--denied-file x needs --tls"),
        (["cloud", "serve", "--admin-listen", "127.0.0.1:0"], "--admin-listen 127.0.0.1:0 goes with --tls"),
        (["device", "serve", "--cloud", "10.0.0.5:7070"], "--cloud 10.0.0.5:7070 is not loopback"),
        (
            ["device", "serve", "--cloud", "127.0.0.1:9", "--listen", "0.0.0.0:0"],
            "--listen 0.0.0.0:0 is not loopback: it needs --api-key-file FILE",
        ),
        (
            ["generate", "--prompts", str(prompts), "--cloud", "cloud:7070"],
            "--cloud cloud:7070 is not loopback",
        ),
        (["doctor", "--cloud", "cloud:7070"], "--cloud cloud:7070 is not loopback"),
    ):
        assert main([*words, "--model", model]) == 2, words
        assert message in capsys.readouterr().err
    assert main(["doctor", "--cloud", "127.0.0.1:9", "--tls", str(tmp_path)]) == 2
    assert f"--tls {tmp_path}: tls.crt cannot be read" in capsys.readouterr().err


async def test_an_operator_s_certificate_ends_also_on_a_connection_that_stands(site: Site) -> None:
    """TLS looks at dates only when a connection begins."""
    reached, statuses = [], []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope["path"])

    async def send(message: Message) -> None:
        statuses.append(message.get("status"))

    async def receive() -> Message:
        return {"type": "http.request"}

    guard = operators_only(app, Access.of(site.cloud(), None))
    issued, now = site.issue(OPERATOR, "op"), datetime.now(UTC)
    for end, passes in ((now + timedelta(hours=1), True), (now - timedelta(minutes=1), False)):
        certificate = site.authority.certify(
            issued.identity, issued.key.public_key(), now - timedelta(hours=2), end
        )
        chain = [certificate.public_bytes(Encoding.PEM).decode()]
        await guard(
            {"type": "http", "path": "/v1/denied", "extensions": {EXTENSION: {"client_cert_chain": chain}}},
            receive,
            send,
        )
        assert (reached == ["/v1/denied"]) is passes
        reached.clear()
    assert 403 in statuses
