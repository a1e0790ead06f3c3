"""The emulated link in a process of its own: a busy Python process would disturb its timing.

`python -m hat_runtime.emulation.link` is that process. It prints one line when it listens, obeys one command a line
on standard input ("link RATE,RTT", "cut", "outage SECONDS", "freeze", "drop SHARE", "stall SECONDS", "stats") with one
line of answer, and ends when its standard input ends: no link outlives whoever started it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from hat_runtime.emulation.proxy import LinkProxy, run_loop
from hat_runtime.emulation.spec import LinkSpec
from hat_runtime.errors import HatError

__all__ = ["EmulatedLink", "LinkSpec", "emulated_link"]


class EmulatedLink:
    """A running link. `address` is what to connect to in place of the far end."""

    def __init__(self, to: str, link: LinkSpec, listen: str = "127.0.0.1:0") -> None:
        """Start the process and wait until it listens.

        Args:
            to: "HOST:PORT" of the far end; it need not be there yet.
            link: rate and round-trip time.
            listen: "HOST:PORT"; port 0 is a free one.

        Raises:
            HatError: it could not listen.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hat_runtime.emulation.link", listen, to, str(link)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,  # Ctrl-C is for whoever started us; we end with our standard input
        )
        try:
            self.address: str = self._answer()["address"]
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The link's process."""
        return self._process.pid

    def set_link(self, link: LinkSpec) -> None:
        """Change rate and times while connections stay open."""
        self._ask(f"link {link}")

    def cut(self) -> None:
        """Reset all connections; new ones are accepted."""
        self._ask("cut")

    def outage(self, seconds: float) -> None:
        """Reset all connections, and for this long each new one."""
        self._ask(f"outage {seconds}")

    def freeze(self) -> None:
        """Leave all connections half-open: they carry nothing any more, and neither end is told. New ones work."""
        self._ask("freeze")

    def drop(self, share: float) -> None:
        """From now on reset this share of the connections, drawn by chance, every 100 ms; 0: none."""
        self._ask(f"drop {share}")

    def stall(self, seconds: float) -> None:
        """Let nothing through for this long."""
        self._ask(f"stall {seconds}")

    def transferred(self) -> tuple[int, int]:
        """(up, down): TCP payload bytes carried so far."""
        stats = self._ask("stats")
        return stats["up_bytes"], stats["down_bytes"]

    def close(self) -> None:
        """End the process; open connections are reset."""
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> EmulatedLink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise HatError(f"the emulated link has ended (exit code {self._process.poll()})") from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise HatError(f"the emulated link has ended (exit code {self._process.wait(5)})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise HatError(str(answer["error"]))
        return answer


@contextlib.contextmanager
def emulated_link(to: str, link: LinkSpec, listen: str = "127.0.0.1:0") -> Iterator[EmulatedLink]:
    """`with emulated_link(to="127.0.0.1:7070", link=LinkSpec.parse("60mbit,20ms")) as link: connect(link.address)`."""
    with EmulatedLink(to, link, listen) as running:
        yield running


def _obey(proxy: LinkProxy, command: str) -> dict[str, Any]:
    name, _, argument = command.strip().partition(" ")
    if name == "link":
        proxy.set_link(LinkSpec.parse(argument))
    elif name == "cut":
        proxy.cut()
    elif name == "outage":
        proxy.outage(float(argument))
    elif name == "freeze":
        proxy.freeze()
    elif name == "drop":
        proxy.drop(float(argument))
    elif name == "stall":
        proxy.stall(float(argument))
    elif name == "stats":
        return {"up_bytes": proxy.up.bytes, "down_bytes": proxy.down.bytes}
    else:
        return {"error": f"unknown command {name!r}"}
    return {"ok": True}


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def main(argv: list[str] | None = None) -> None:
    """The link's process."""
    parser = argparse.ArgumentParser()
    for name in ("listen", "to", "link"):
        parser.add_argument(name)
    args = parser.parse_args(argv)

    async def run() -> None:
        proxy = LinkProxy(_address(args.to), LinkSpec.parse(args.link))
        try:
            print(json.dumps({"address": await proxy.start(*_address(args.listen))}), flush=True)
        except HatError as error:
            print(json.dumps({"error": str(error)}), flush=True)
            return
        commands = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
        try:
            while line := await commands.readline():
                print(json.dumps(_obey(proxy, line.decode())), flush=True)
        finally:
            await proxy.close()

    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        run_loop(run)


if __name__ == "__main__":
    main()
