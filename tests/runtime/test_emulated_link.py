"""The emulated link: what every test and benchmark over a slow network stands on."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import psutil
import pytest

from hat_runtime.emulation.link import EmulatedLink, emulated_link
from hat_runtime.emulation.measure import far_end, measure_downlink, measure_link, measure_rtt, measure_uplink
from hat_runtime.emulation.spec import LinkSpec
from hat_runtime.errors import HatError

FAST = LinkSpec.parse("1gbit,2ms")


def _connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def _listen() -> tuple[socket.socket, str]:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(20)
    return listener, f"127.0.0.1:{listener.getsockname()[1]}"


def once_exact(check: Callable[[], None]) -> None:
    """A crowded machine only makes the link look slower: one exact measurement of several proves it right."""
    for _ in range(20):
        with contextlib.suppress(AssertionError):
            check()
            return
    check()


@pytest.mark.parametrize("text", ["60mbit,20ms", "8mbit,50ms", "200mbit,5ms"])
def test_rate_within_2_percent_and_rtt_within_1_ms(text: str) -> None:
    link = LinkSpec.parse(text)

    def check() -> None:
        seen = measure_link(link, seconds=0.3)  # medians of several
        assert seen.up_bytes_per_s == pytest.approx(link.rate_bytes_per_s, rel=0.02)
        assert seen.down_bytes_per_s == pytest.approx(link.rate_bytes_per_s, rel=0.02)
        assert seen.rtt_s == pytest.approx(link.rtt_s, abs=0.001)

    once_exact(check)


def test_connections_share_the_rate() -> None:
    """Four transfers at once take as long as one of their total size, and none of them starves."""
    link = LinkSpec.parse("40mbit,10ms")
    size = 500_000
    alone = size / link.rate_bytes_per_s

    def check() -> None:
        ends: list[float] = []

        def transfer() -> None:
            measure_uplink(running.address, size, count=1)
            ends.append(time.perf_counter())

        with far_end() as server, emulated_link(server, link) as running:
            threads = [threading.Thread(target=transfer) for _ in range(4)]
            start = time.perf_counter()
            for thread in threads:
                thread.start()
            down = measure_downlink(running.address, 1_000_000, count=1)
            for thread in threads:
                thread.join()
        assert max(ends) - start > 0.97 * 4 * alone
        assert min(ends) - start > 2 * alone
        assert down == pytest.approx(link.rate_bytes_per_s, rel=0.1)  # the other direction is not slowed

    once_exact(check)


def test_a_full_link_holds_the_sender_back() -> None:
    """The link buffers little: a sender that is not read cannot pour megabytes into it."""
    listener, address = _listen()
    with listener, emulated_link(address, FAST) as link, _connect(link.address) as client:
        server, _ = listener.accept()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        client.settimeout(0.5)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 64 << 20:
                sent += client.send(bytes(64 * 1024))
        assert sent < 16 << 20  # the rest is the kernel's own buffers
        client.settimeout(20)
        server.settimeout(20)
        received = 0
        while received < sent:
            received += len(server.recv(1 << 20))
        assert received == sent  # nothing was lost meanwhile
        server.close()


def test_the_half_close_is_passed_on() -> None:
    listener, address = _listen()
    with listener, emulated_link(address, FAST) as link, _connect(link.address) as client:
        server, _ = listener.accept()
        with server:
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            assert server.makefile("rb").read() == b"question"
            server.sendall(b"answer")
            server.shutdown(socket.SHUT_WR)
            assert client.makefile("rb").read() == b"answer"


def test_a_refused_far_end_closes_the_connection() -> None:
    listener, address = _listen()
    listener.close()
    with (
        emulated_link(address, FAST) as link,
        _connect(link.address) as client,
        contextlib.suppress(ConnectionResetError),
    ):
        assert client.recv(1) == b""


def test_link_changes_while_it_runs() -> None:
    with far_end() as server, emulated_link(server, LinkSpec.parse("60mbit,60ms")) as link:
        assert measure_rtt(link.address, 5) > 0.060
        link.set_link(LinkSpec.parse("60mbit,10ms"))
        once_exact(lambda: _assert_close(measure_rtt(link.address, 10), 0.010))


def _assert_close(seen: float, wanted: float) -> None:
    assert seen == pytest.approx(wanted, abs=0.002)


def test_cut_resets_connections_and_accepts_new_ones() -> None:
    listener, address = _listen()
    with listener, emulated_link(address, FAST) as link, _connect(link.address) as client:
        server, _ = listener.accept()
        with server:
            client.sendall(b"x")
            assert server.recv(1) == b"x"
            link.cut()
            for end in (client, server):
                with contextlib.suppress(ConnectionResetError):
                    assert end.recv(1) == b""
        with _connect(link.address) as client, listener.accept()[0] as server:
            client.sendall(b"y")
            assert server.recv(1) == b"y"


def test_stall_holds_both_directions_then_goes_on() -> None:
    listener, address = _listen()
    with listener, emulated_link(address, FAST) as link, _connect(link.address) as client:
        server, _ = listener.accept()
        with server:
            start = time.monotonic()
            link.stall(0.4)
            client.sendall(b"up")
            server.sendall(b"down")
            assert server.recv(4) == b"up"
            assert client.recv(4) == b"down"
            assert time.monotonic() - start > 0.35


def test_bytes_are_counted() -> None:
    with far_end() as server, emulated_link(server, FAST) as link:
        measure_downlink(link.address, 100_000, count=1)
        up, down = link.transferred()
    assert down == 100_000
    assert 0 < up < 100


def test_a_busy_port_is_named() -> None:
    listener, address = _listen()
    with listener, pytest.raises(HatError, match=address):
        EmulatedLink("127.0.0.1:1", FAST, listen=address)


def test_closing_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    with far_end() as server, emulated_link(server, FAST) as link:
        connection = _connect(link.address)
        connection.sendall(b"E")
    connection.close()
    assert capfd.readouterr().err == ""


def test_the_process_ends_with_its_starter() -> None:
    """Even when the starter is killed: its end of standard input closes."""
    code = (
        "import sys, time; from hat_runtime.emulation.link import EmulatedLink, LinkSpec;"
        "link = EmulatedLink('127.0.0.1:1', LinkSpec(1e6, 0.01)); print(link.pid, flush=True); time.sleep(60)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    child = psutil.Process(int(starter.stdout.readline()))
    starter.kill()
    starter.wait()
    starter.stdout.close()
    assert psutil.wait_procs([child], timeout=20)[1] == []


def test_the_command_prints_its_address_and_ends_on_interrupt() -> None:
    command = (
        "import argparse; from hat_runtime.cli.link import COMMAND; parser = argparse.ArgumentParser();"
        "COMMAND.configure(parser); COMMAND.run(parser.parse_args())"
    )
    with far_end() as server:
        process = subprocess.Popen(
            [sys.executable, "-c", command, "--listen", "127.0.0.1:0", "--to", server, "--link", "1gbit,2ms"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        address = process.stdout.readline().split()[2]
        assert measure_rtt(address, 3) > 0.002
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert errors.strip().splitlines()[-1:] == ["KeyboardInterrupt"]  # which `hat` turns into "interrupted"
    assert "Task" not in errors
