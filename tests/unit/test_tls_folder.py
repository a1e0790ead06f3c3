"""The folder of --tls: read again when it changes, and only as a whole."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from hat_runtime.errors import UsageError
from hat_runtime.security.folder import CHECK_S, TlsFolder
from hat_runtime.security.spiffe import CLOUD, DEVICE
from tests.certificates import Site, expired, of_tomorrow, replace


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_new_files_are_seen_within_the_check_interval(site: Site) -> None:
    path, clock = site.device(), Clock()
    folder = TlsFolder(path, DEVICE, clock=clock)
    before = folder.current()
    new = site.issue(DEVICE, "jetson-1")
    replace(path, new)
    assert folder.current() is before
    clock.now += CHECK_S
    assert folder.current().certificate == new.certificate
    assert before != folder.current()


def test_symbolic_links_swapped_as_kubelet_does(site: Site, tmp_path: Path) -> None:
    first, second = site.device("one"), site.device("two")
    mount = tmp_path / "mount"
    mount.mkdir()
    (mount / "..data").symlink_to(first)
    for name in ("tls.crt", "tls.key", "ca.crt"):
        (mount / name).symlink_to(Path("..data") / name)
    clock = Clock()
    folder = TlsFolder(mount, DEVICE, clock=clock)
    assert folder.current().identity.name == "one"
    (mount / "..data_tmp").symlink_to(second)
    os.replace(mount / "..data_tmp", mount / "..data")
    clock.now += CHECK_S
    assert folder.current().identity.name == "two"


def test_files_that_do_not_go_together_wait_until_they_do(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = site.device(), Clock()
    folder = TlsFolder(path, DEVICE, clock=clock)
    before, new = folder.current(), site.device()
    (new / "tls.crt").replace(path / "tls.crt")
    with caplog.at_level(logging.ERROR):
        for logged in (0, 1, 1):
            clock.now += CHECK_S
            assert folder.current() is before
            assert len(caplog.messages) == logged
    assert "tls.key is not the key of tls.crt" in caplog.messages[0]
    (new / "tls.key").replace(path / "tls.key")
    clock.now += CHECK_S
    assert folder.current() != before
    (path / "ca.crt").unlink()
    for _ in range(2):
        clock.now += CHECK_S
        assert folder.current().identity == before.identity
    assert "ca.crt cannot be read" in caplog.messages[1]
    assert len(caplog.messages) == 2


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: (path / "tls.crt").unlink(), "tls.crt cannot be read: No such file"),
        (lambda path: (path / "tls.crt").write_text("none"), "tls.crt holds no certificate in PEM"),
        (lambda path: (path / "ca.crt").write_text(""), "ca.crt holds no certificate in PEM"),
        (lambda path: (path / "tls.key").write_text("secret"), "tls.key is no private key"),
    ],
)
def test_a_folder_that_is_not_usable_at_the_start(
    site: Site, spoil: Callable[[Path], object], words: str
) -> None:
    path = site.device()
    spoil(path)
    with pytest.raises(UsageError, match=words) as failure:
        TlsFolder(path, DEVICE)
    assert str(path) in str(failure.value)
    assert "secret" not in str(failure.value)


def test_a_certificate_of_another_kind(site: Site) -> None:
    with pytest.raises(
        UsageError, match=r"spiffe://site\.example/tenant/acme/device/jetson-1, which is no cloud"
    ):
        TlsFolder(site.device(), CLOUD)
    path = site.device()
    (path / "tls.crt").write_bytes(site.authority.certificate.public_bytes(Encoding.PEM))
    with pytest.raises(UsageError, match=r"tls\.key is not the key"):
        TlsFolder(path, DEVICE)


def test_why_not_valid(site: Site) -> None:
    valid = [TlsFolder(site.device(**when), DEVICE).current() for when in ({}, expired(), of_tomorrow())]
    assert valid[0].why_not_valid() is None
    assert (valid[1].why_not_valid() or "").startswith("expired at 20")
    assert (valid[2].why_not_valid() or "").startswith("not valid before 20")
    assert (valid[0].why_not_valid(datetime(2100, 1, 1, tzinfo=UTC)) or "").startswith("expired")


def test_no_key_in_a_representation(site: Site) -> None:
    folder = TlsFolder(site.device(), DEVICE)
    assert "PRIVATE" in folder.current().key.decode()
    assert "PRIVATE" not in repr(folder.current())
