"""Writing a folder all at once: it is there whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hat_runtime.errors import HatError, UsageError
from hat_runtime.model.manifest import MANIFEST_FILE


@contextmanager
def new_folder(target: Path, owned: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place at the end, or vanishes on any error or Ctrl-C.

    The caller holds the lock of `target` (cache.lock), so that what an earlier, killed run left can be removed.

    Args:
        target: what is there already is replaced.
        owned: `target` lies in HAT's cache, so it is HAT's even if its manifest is lost.

    Raises:
        UsageError: `target` is not owned, not empty and was not written by HAT.
        HatError: no space, or no right to write there.
    """
    if not owned:
        check_replaceable(target)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left_over in target.parent.glob(f".{target.name}.new-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
        temporary.chmod(0o755)
        yield temporary
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
        _replace(temporary, target)
    except OSError as error:
        raise _explained(error, target) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(target: Path) -> None:
    """Refuse to write over anything that `hat model prepare` did not write.

    Raises:
        UsageError: names the folder.
    """
    if target.exists() and not target.is_dir():
        raise UsageError(f"--out {target} is a file; name a new folder")
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST_FILE).is_file():
        raise UsageError(f"--out {target} is not empty and was not written by hat; name a new folder")


def check_space(folder: Path, needed: int) -> None:
    """See to it that `needed` bytes fit where `folder` will be.

    Raises:
        HatError: names the folder, the bytes needed and the bytes free.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise HatError(_no_space(folder, needed, free))


def _no_space(folder: Path, needed: int | None, free: int) -> str:
    need = f"{needed:,} bytes needed, " if needed is not None else ""
    return f"no space for {folder}: {need}{free:,} free; free some, or set HAT_CACHE or --out to another disk"


def _explained(error: OSError, target: Path) -> HatError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed = getattr(error, "hat_needed", None)
        return HatError(_no_space(target, needed, shutil.disk_usage(_existing(target)).free))
    return HatError(f"cannot write {target}: {error.strerror or error}")


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _replace(new: Path, target: Path) -> None:
    """Rename is atomic onto nothing or an empty folder; an older one steps aside first, and back if that fails."""
    if not target.exists():
        new.rename(target)
    else:
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
        target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            with suppress(OSError):
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
