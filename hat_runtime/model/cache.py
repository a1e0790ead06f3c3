"""Where HAT keeps what it computed once: prepared models, identities of foreign folders, locks."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hat_runtime.errors import HatError


def cache_dir() -> Path:
    """$HAT_CACHE, or ~/.cache/hat ($XDG_CACHE_HOME/hat where that is set). It need not exist yet."""
    chosen = os.environ.get("HAT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hat"


def models_dir() -> Path:
    """Where prepared models lie. The number goes up when a converter writes something else from the same source."""
    return cache_dir() / "models-2"


@contextmanager
def lock(target: Path) -> Iterator[None]:
    """Let one process at a time write `target`; the others wait.

    The lock lives in the cache folder, not beside the target, so that it leaves nothing there. The kernel drops it
    with its process, so a killed one blocks nobody.

    Raises:
        HatError: the cache folder cannot be written.
    """
    folder = cache_dir() / "locks"
    name = hashlib.sha256(str(target.absolute()).encode()).hexdigest()[:24]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise HatError(
            f"cannot write the cache folder {folder}: {error.strerror}; set HAT_CACHE to a writable folder"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
