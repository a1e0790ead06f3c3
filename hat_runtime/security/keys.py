"""The API keys of a file. Neither a key nor a part of one is ever logged."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from pathlib import Path

from hat_runtime.errors import UsageError

log = logging.getLogger(__name__)

CHECK_S = 1.0
MAX_BYTES = 1 << 20


def read_keys(path: Path, option: str = "--api-key-file") -> list[str]:
    """The keys of a file: one a line; empty lines and lines that begin with # are none.

    Raises:
        UsageError: the file cannot be read, is no text, or is longer than 1 MiB.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        lines = content.decode().splitlines()
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:  # its own text would show the file's bytes
        raise UsageError(f"{option} {path} is not text in UTF-8 (byte {error.start})") from None
    if len(content) > MAX_BYTES:
        raise UsageError(f"{option} {path} is longer than {MAX_BYTES} bytes")
    return [key for line in lines if (key := line.strip()) and not key.startswith("#")]


class KeyFile:
    """Keys that are valid now: the file is read again when it has changed, looked at on use, at most once a second."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the keys.

        Raises:
            UsageError: it cannot be read or has no key, which would mean a server that refuses everybody.
        """
        self._path = path
        self._clock = clock
        self._checked_s = clock()
        keys = read_keys(path)
        if not keys:
            raise UsageError(f"--api-key-file {path} has no key in it")
        self._digests = _digests(keys)

    def accepts(self, authorization: str) -> bool:
        """Whether an Authorization header's value is `Bearer KEY` with one of the keys.

        All keys are compared, each in constant time and by its digest, so that the time taken tells neither which one
        was nearly right nor how long it is.
        """
        self._look()
        scheme, _, key = authorization.partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        right = sum(hmac.compare_digest(given, known) for known in self._digests)
        return scheme.lower() == "bearer" and right > 0

    def _look(self) -> None:
        now = self._clock()
        if now - self._checked_s < CHECK_S:
            return
        self._checked_s = now
        try:
            digests = _digests(read_keys(self._path))
        except UsageError as error:
            log.error("%s; the keys before stay valid", error)
            return
        if digests != self._digests:
            self._digests = digests
            log.info("--api-key-file %s: %d keys are valid now", self._path, len(digests))


def _digests(keys: list[str]) -> list[bytes]:
    return [hashlib.sha256(key.encode()).digest() for key in keys]
