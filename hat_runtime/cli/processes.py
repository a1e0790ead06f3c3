"""Child processes that end with their parent, whatever happens to it."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import IO

from hat_runtime.errors import HatError

_POLL_S = 0.05
_TAIL_LINES = 8


class Child:
    """A process whose output goes to an unnamed temporary file."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        cores: Collection[int] | None = None,
    ) -> None:
        """Start `command`.

        Args:
            name: what messages call it.
            command: program and arguments.
            env: environment variables beside ours.
            cores: processor cores that it may use; default: ours.
        """
        self.name = name
        # Opened for appending: reading must not move where the child writes.
        self._output: IO[bytes] = tempfile.TemporaryFile("a+b")  # noqa: SIM115 (closed by stop)
        allowed = ",".join(map(str, sorted(cores))) if cores is not None else "-"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hat_runtime.cli.guarded", str(os.getpid()), allowed, *command],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,  # Ctrl-C is for the parent, which ends its children in order
        )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def output(self) -> str:
        """All that it has printed."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace")

    def check(self) -> None:
        """Raise HatError with its last lines if it has ended."""
        code = self.exit_code
        if code is not None:
            lines = "\n".join(f"  | {line}" for line in self.output().strip().splitlines()[-_TAIL_LINES:])
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise HatError(f"the {self.name} process {how}; its last lines:\n{lines or '  | (no output)'}")

    def wait(self, timeout_s: float) -> None:
        """Wait until it has ended.

        Raises:
            HatError: it takes too long.
        """
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise HatError(f"the {self.name} process did not end within {timeout_s:g} s") from error

    def wait_ready(self, url: str, timeout_s: float = 120.0, tick: Callable[[], None] | None = None) -> None:
        """Wait until `url` answers with status 200; `tick` is called meanwhile.

        Raises:
            HatError: it ended, or the time is over; the text shows its last lines or its reason.
        """
        deadline = time.monotonic() + timeout_s
        while (reason := why_not_ready(url)) is not None:
            self.check()
            if time.monotonic() > deadline:
                raise HatError(f"the {self.name} process was not ready within {timeout_s:g} s: {reason}")
            if tick is not None:
                tick()
            time.sleep(_POLL_S)

    def stop(self, grace_s: float = 5.0) -> None:
        """End it: first by SIGTERM, after the grace by SIGKILL."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._output.close()


class Children:
    """Starts children, and stops all of them on exit, the last one first."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in reversed(self._children):
            child.stop()

    def start(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        cores: Collection[int] | None = None,
    ) -> Child:
        """See Child."""
        child = Child(name, command, env, cores)
        self._children.append(child)
        return child

    def check(self) -> None:
        """Raise HatError if one of them has ended."""
        for child in self._children:
            child.check()


def hat_command(*arguments: str) -> list[str]:
    """A `hat` command line for a child, with this Python."""
    return [sys.executable, "-m", "hat_runtime.cli.main", *arguments]


def free_address() -> str:
    """ "127.0.0.1:PORT" of a port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def check_free(host: str, port: int, option: str) -> None:
    """Raise HatError if nothing can listen there; cheaper than learning it from a child that has loaded a model."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise HatError(
            f"{option} {host}:{port}: cannot listen there: {error.strerror}; choose another port, or 0 for a free one"
        ) from error


def why_not_ready(url: str) -> str | None:
    """None when `url` answers with status 200, else what it says or why it cannot be reached."""
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310 (our own children)
            return None
    except urllib.error.HTTPError as error:
        with error:
            return error.read(500).decode(errors="replace").strip() or f"status {error.code}"
    except (OSError, http.client.HTTPException) as error:
        return str(error)


@contextlib.contextmanager
def exits_on_sigterm() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this process by SystemExit, so that `with` blocks and children end in order."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
