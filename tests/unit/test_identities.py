"""SPIFFE ids, deny-lists, and what may face a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hat_runtime.cloud.access import Denied
from hat_runtime.cloud.documents import OlderDocument
from hat_runtime.errors import UsageError
from hat_runtime.json_document import MAX_BYTES
from hat_runtime.security.denied import MAX_ENTRIES, DeniedError, DenyList, parse
from hat_runtime.security.exposure import check_dialled, check_exposed, is_loopback
from hat_runtime.security.spiffe import CLOUD, DEVICE, IdentityError, SpiffeId

ONE = "spiffe://site.example/tenant/acme/device/jetson-1"


def test_an_identity_is_its_text() -> None:
    identity = SpiffeId("site.example", "acme", DEVICE, "jetson-1")
    assert str(identity) == ONE
    assert SpiffeId.parse(ONE) == identity
    assert identity.dns_names == ()
    cloud = SpiffeId("site.example", "acme", CLOUD, "c")
    assert cloud.dns_names == ("hat-cloud.hat.internal", "acme.site.example.hat-cloud.hat.internal")
    assert cloud.cloud_dns_name == identity.cloud_dns_name
    assert cloud.tenants_of(cloud.dns_names) == {"acme"}
    others = [
        SpiffeId(domain, tenant, CLOUD, "c")
        for domain, tenant in (("site.example", "b"), ("else.example", "c"))
    ]
    names = [name for one in others for name in one.dns_names]
    assert cloud.tenants_of([*names, "A.site.example.hat-cloud.hat.internal"]) == {"acme", "b"}


@pytest.mark.parametrize(
    ("uri", "echoed"),
    [
        ("https://site.example/tenant/acme/device/x", "https://site.example"),
        (f"{ONE}/more", "/more"),
        (ONE + "\n", "jetson-1"),
        (ONE.replace("tenant", "ns"), "/ns/"),
        (ONE.replace("site.example", "Site.example"), "'Site.example'"),
        (ONE.replace("site.example", "site..example"), "'site..example'"),
        (ONE.replace("site.example", "a." * 80 + "b"), "at most 160"),
        (ONE.replace("acme", "ac.me"), "'ac.me'"),
        (ONE.replace("acme", "a" * 64), "at most 63"),
        (ONE.replace("device", "router"), "'router'"),
        (ONE.replace("jetson-1", "jets%6fn"), "'jets%6fn'"),
        (ONE.replace("jetson-1", ".."), "'..'"),
        (ONE.replace("jetson-1", "x" * 254), "at most 253"),
    ],
)
def test_what_is_no_identity(uri: str, echoed: str) -> None:
    with pytest.raises(IdentityError) as failure:
        SpiffeId.parse(uri)
    assert echoed in str(failure.value)


def test_a_deny_list_by_name_and_by_number() -> None:
    found = parse(json.dumps({"version": 3, "denied": [ONE, "0A:3f", "00ff"], "later": 1}))
    assert (found.version, found.serials) == (3, {0x0A3F, 0xFF})
    identity, other = SpiffeId.parse(ONE), SpiffeId.parse(f"{ONE}0")
    assert found.denies(identity, 1)
    assert found.denies(other, 0x0A3F)
    assert not found.denies(other, 1)
    assert parse(found.to_json()) == found
    assert json.loads(found.to_json()) == {"version": 3, "denied": [ONE, "ff", "a3f"]}


@pytest.mark.parametrize(
    ("text", "path", "shown"),
    [
        (b"{", "denied", "'{'"),
        (b"[]", "denied", "[]"),
        (b"\xff", "denied", "'\ufffd'"),
        (b'{"denied": []}', "version", "None"),
        (b'{"version": true, "denied": []}', "version", "True"),
        (b'{"version": -1, "denied": []}', "version", "-1"),
        (b'{"version": 1}', "denied", "None"),
        (b'{"version": 1, "denied": ["ff", 7]}', "denied[1]", "7"),
        (b'{"version": 1, "denied": ["xyz"]}', "denied[0]", "'xyz'"),
        (b'{"version": 1, "denied": [""]}', "denied[0]", "''"),
        (b'{"version": 1, "denied": ["spiffe://x"]}', "denied[0]", "'spiffe://x'"),
        (
            json.dumps({"version": 1, "denied": ["f"] * (MAX_ENTRIES + 1)}).encode(),
            "denied",
            f"'{MAX_ENTRIES + 1} entries'",
        ),
        (b" " * (MAX_BYTES + 1), "denied", f"'{MAX_BYTES + 1} bytes'"),
    ],
)
def test_what_is_no_deny_list(text: bytes, path: str, shown: str) -> None:
    with pytest.raises(DeniedError) as failure:
        parse(text)
    assert (failure.value.path, failure.value.shown) == (path, shown)


def test_versions_only_grow(tmp_path: Path) -> None:
    denied = Denied()
    denied.start_from(tmp_path / "none.json")
    assert denied.current == DenyList()
    file = tmp_path / "denied.json"
    file.write_text('{"version": 2, "denied": ["ff"]}')
    denied.start_from(file)
    same = denied.put(b'{"denied": ["FF"], "version": 2}')
    assert same is denied.current
    for older in (b'{"version": 2, "denied": []}', b'{"version": 1, "denied": ["ff"]}'):
        with pytest.raises(OlderDocument, match="more than 2"):
            denied.put(older)
    assert denied.put(b'{"version": 3, "denied": []}').version == 3
    file.write_text("{")
    with pytest.raises(DeniedError, match=r"--denied-file: .*denied.json.*must be JSON"):
        denied.start_from(file)


def test_loopback() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "LocalHost"):
        assert is_loopback(host), host
    for host in ("0.0.0.0", "::", "10.0.0.5", "cloud", "localhost.example.com", "", "127.0.0.1.example.com"):
        assert not is_loopback(host), host


def test_what_strangers_reach_needs_protection_or_a_word() -> None:
    def check(host: str, *, protected: bool = False, insecure: bool = False) -> None:
        check_exposed(host, 7070, "--listen", protected=protected, needs="it needs X", insecure=insecure)

    check("127.0.0.1")
    check("0.0.0.0", protected=True)
    check("0.0.0.0", insecure=True)
    with pytest.raises(UsageError, match=r"--listen 0.0.0.0:7070 is not loopback: it needs X, or --insecure"):
        check("0.0.0.0")
    with pytest.raises(UsageError, match=r"--cloud cloud:7070 is not loopback: it needs --tls"):
        check_dialled("cloud:7070", None, insecure=False)
    check_dialled("cloud:7070", Path("tls"), insecure=False)
    check_dialled("[::1]:7070", None, insecure=False)
