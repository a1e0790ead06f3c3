"""What may face a network: without TLS or a key, loopback only."""

from __future__ import annotations

import ipaddress

from hat_runtime.errors import UsageError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`: 127.0.0.0/8, ::1 or localhost. No name is looked up."""
    if host.lower() in ("localhost", "localhost."):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return False


def check_exposed(
    host: str, port: int | str, option: str, *, protected: bool, needs: str, insecure: bool
) -> None:
    """Refuse an address that strangers can reach, unless something protects it or the user says so.

    Args:
        host: to listen on or to dial.
        port: of it.
        option: that named the address.
        protected: TLS or keys are there.
        needs: what would protect it, for the message.
        insecure: --insecure was given.

    Raises:
        UsageError: echoes the address and says what to do.
    """
    if not (protected or insecure or is_loopback(host)):
        raise UsageError(
            f"{option} {host}:{port} is not loopback: {needs}, or --insecure to go without on a network that you trust"
        )


def check_dialled(address: str, tls: object | None, *, insecure: bool, option: str = "--cloud") -> None:
    """Refuse to dial a cloud elsewhere without TLS, unless the user says so.

    Args:
        address: "HOST:PORT".
        tls: None without TLS.
        insecure: --insecure was given.
        option: that named the address.

    Raises:
        UsageError: echoes the address and says what to do.
    """
    host, _, port = address.rpartition(":")
    check_exposed(
        host, port, option, protected=tls is not None, needs="it needs --tls DIR", insecure=insecure
    )
