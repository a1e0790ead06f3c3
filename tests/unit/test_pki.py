"""`hat pki`."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage

from hat_runtime.cli.main import main
from hat_runtime.security.folder import TlsFolder


@pytest.fixture
def authority(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    folder = tmp_path / "ca"
    assert main(["pki", "init", "--out", str(folder), "--trust-domain", "home.example"]) == 0
    capsys.readouterr()
    return folder


def issue(authority: Path, out: Path, *options: str) -> int:
    return main(["pki", "issue", "--ca", str(authority), "--out", str(out), *options])


@pytest.mark.parametrize(
    ("kind", "usage", "names"),
    [
        ("device", Usage.CLIENT_AUTH, []),
        ("operator", Usage.CLIENT_AUTH, []),
        ("cloud", Usage.SERVER_AUTH, ["hat-cloud.hat.internal", "t1.home.example.hat-cloud.hat.internal"]),
    ],
)
def test_a_certificate_for_each_kind(
    authority: Path, tmp_path: Path, kind: str, usage: x509.ObjectIdentifier, names: list[str]
) -> None:
    out = tmp_path / "out"
    assert issue(authority, out, f"--{kind}", "a.b", "--tenant", "t1", "--hours", "2") == 0
    material = TlsFolder(out, kind).current()
    assert str(material.identity) == f"spiffe://home.example/tenant/t1/{kind}/a.b"
    certificate = material.certificate
    extensions = certificate.extensions
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [usage]
    alternative = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert alternative.get_values_for_type(x509.DNSName) == names
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(hours=1.9) < left <= timedelta(hours=2)
    signer = x509.load_pem_x509_certificate((authority / "ca.crt").read_bytes())
    certificate.verify_directly_issued_by(signer)
    assert (out / "ca.crt").read_bytes() == (authority / "ca.crt").read_bytes()
    for key in (out / "tls.key", authority / "ca.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_a_cloud_of_several_tenants(authority: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert issue(authority, out, "--cloud", "c", "--tenant", "t1", "--also", "t2", "t1", "t-3") == 0
    material = TlsFolder(out, "cloud").current()
    assert material.tenants == {"t1", "t2", "t-3"}
    alternative = material.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert alternative.get_values_for_type(x509.DNSName) == [
        "hat-cloud.hat.internal",
        *(f"{tenant}.home.example.hat-cloud.hat.internal" for tenant in ("t1", "t2", "t-3")),
    ]


def test_nothing_is_overwritten(authority: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert issue(authority, out, "--device", "a") == 0
    before = {file: file.read_bytes() for folder in (out, authority) for file in folder.iterdir()}
    assert issue(authority, out, "--device", "b") == 2
    assert f"--out {out}: tls.key is there already" in capsys.readouterr().err
    assert main(["pki", "init", "--out", str(authority), "--trust-domain", "x"]) == 2
    assert {file: file.read_bytes() for folder in (out, authority) for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "a/b"], "name 'a/b'"),
        (["--device", "a", "--tenant", "A"], "tenant 'A'"),
        (["--cloud", "a", "--also", "b", "B"], "tenant 'B'"),
        (["--device", "a", "--also", "b"], "--also b: only a cloud"),
        (["--device", "a", "--hours", "0"], "--hours 0"),
        (["--device", "a", "--hours", "-1"], "--hours -1"),
        (["--device", "a", "--hours", "nan"], "--hours nan"),
        (["--device", "a", "--hours", "1e300"], "--hours 1e+300"),
    ],
)
def test_wrong_values_are_echoed(
    authority: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert issue(authority, tmp_path / "out", *options) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_authority(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert issue(tmp_path, tmp_path / "out", "--device", "a") == 2
    assert f"--ca {tmp_path} was not made by `hat pki init`" in capsys.readouterr().err
    assert main(["pki", "init", "--out", str(tmp_path / "ca"), "--trust-domain", "Home"]) == 2
    assert "trust domain 'Home'" in capsys.readouterr().err
