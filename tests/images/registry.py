"""A container registry on loopback: Debian's docker-registry, unpacked only: installed it would start a service."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.ci import skip_or_fail
from tests.harness.controlplane import free_port
from tests.images.machine import cache_folder

PACKAGE = "docker-registry"
_READY_S = 60.0


def find_program() -> Path:
    """The program, from PATH or from Debian's package. Skips the test where it cannot be had (in CI: fails it)."""
    if found := shutil.which(PACKAGE):
        return Path(found)
    kept = cache_folder() / PACKAGE
    if kept.is_file():
        return kept
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        skip_or_fail(f"images: no {PACKAGE} on PATH, and no apt-get to fetch it with")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)  # apt fetches as its own user
        fetched = subprocess.run(
            ["apt-get", "-qq", "download", PACKAGE], cwd=folder, capture_output=True, text=True, check=False
        )
        if fetched.returncode:
            skip_or_fail(f"images: apt-get cannot download {PACKAGE}: {fetched.stderr.strip()}")
        (package,) = folder.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder / "root")], check=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / "root" / "usr" / "bin" / PACKAGE, kept)
    return kept


@contextmanager
def registry(folder: Path) -> Iterator[str]:
    """HOST:PORT of an empty registry that lives until the block ends; its files lie in `folder`."""
    program = find_program()
    port = free_port()
    config = folder / "registry.yaml"
    config.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {folder / 'registry'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\nlog: {{level: error}}\n"
    )
    process = subprocess.Popen([str(program), "serve", str(config)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _READY_S
        while not _answers(port):
            assert process.poll() is None, f"{PACKAGE} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{PACKAGE} does not answer"
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
