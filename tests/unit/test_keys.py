"""API keys of a file."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hat_runtime.errors import UsageError
from hat_runtime.security.keys import CHECK_S, MAX_BYTES, KeyFile, read_keys


def test_one_key_a_line_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the phone\nfirst-key\n\n  second#key  \n#third\n")
    assert read_keys(file) == ["first-key", "second#key"]
    keys = KeyFile(file)
    for right in ("Bearer first-key", "bearer second#key", "BEARER  first-key"):
        assert keys.accepts(right), right
    for wrong in (
        "",
        "Bearer",
        "Bearer ",
        "first-key",
        "Basic first-key",
        "Bearer first-key2",
        "Bearer #third",
        "Bearer \xff",
    ):
        assert not keys.accepts(wrong), wrong


def test_keys_change_while_the_server_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, now = tmp_path / "keys", [0.0]
    file.write_text("old-key\n")
    keys = KeyFile(file, lambda: now[0])
    file.write_text("new-key\n")
    assert keys.accepts("Bearer old-key")
    with caplog.at_level(logging.DEBUG):
        now[0] += CHECK_S
        assert keys.accepts("Bearer new-key")
        assert not keys.accepts("Bearer old-key")
        file.unlink()
        now[0] += CHECK_S
        assert keys.accepts("Bearer new-key")
        assert "cannot be read" in caplog.messages[-1]
        file.write_text("# nobody\n")
        now[0] += CHECK_S
        assert not keys.accepts("Bearer new-key")
        assert not keys.accepts("Bearer ")
    assert "-key " not in caplog.text
    assert "new-key" not in caplog.text


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        KeyFile(file)
    file.write_text("# none\n")
    with pytest.raises(UsageError, match="has no key in it"):
        KeyFile(file)
    file.write_bytes(b"secret\xff")
    with pytest.raises(UsageError, match=r"not text in UTF-8 \(byte 6\)") as failure:
        KeyFile(file)
    assert "secret" not in str(failure.value)
    file.write_bytes(b"k" * (MAX_BYTES + 1))
    with pytest.raises(UsageError, match="longer than"):
        KeyFile(file)
