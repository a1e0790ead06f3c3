"""The deny-list: whose certificates are refused though they are valid. Its JSON form, and what must hold. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hat_runtime.errors import FieldError
from hat_runtime.json_document import MAX_VERSION, as_integer, read_object
from hat_runtime.security.spiffe import IdentityError, SpiffeId

MAX_ENTRIES = 10_000
_SERIAL = re.compile(r"[0-9a-f]{1,40}")  # RFC 5280: at most 20 bytes


class DeniedError(FieldError):
    """A field of a deny-list cannot be used: which one, its value, and what it must be."""


@dataclass(frozen=True)
class DenyList:
    """Those who are refused. Version 0 is that of a cloud that was told nothing."""

    version: int = 0
    identities: frozenset[SpiffeId] = frozenset()
    serials: frozenset[int] = frozenset()
    """Numbers of certificates."""

    def denies(self, identity: SpiffeId, serial: int) -> bool:
        """Whether somebody with this identity and certificate is refused."""
        return identity in self.identities or serial in self.serials

    def to_json(self) -> str:
        """The text that `parse` reads."""
        denied = [*sorted(map(str, self.identities)), *(f"{serial:x}" for serial in sorted(self.serials))]
        return json.dumps({"version": self.version, "denied": denied}, separators=(",", ":"))


def parse(text: bytes | str) -> DenyList:
    """Read a deny-list. Fields that are not known are ignored: a later version may have more.

    Raises:
        DeniedError: names the field and echoes its value; the first that is wrong.
    """
    content = read_object(text, "denied", DeniedError)
    version = as_integer(content.get("version"), "version", 0, MAX_VERSION, DeniedError)
    entries = content.get("denied")
    if not isinstance(entries, list):
        raise DeniedError("denied", entries, "must be a list")
    if len(entries) > MAX_ENTRIES:
        raise DeniedError("denied", f"{len(entries)} entries", f"must be at most {MAX_ENTRIES}")
    return _list(version, entries)


def _list(version: int, entries: Iterable[Any]) -> DenyList:
    identities, serials = set(), set()
    for index, entry in enumerate(entries):
        path = f"denied[{index}]"
        if not isinstance(entry, str):
            raise DeniedError(path, entry, "must be a text")
        if entry.startswith("spiffe:"):
            try:
                identities.add(SpiffeId.parse(entry))
            except IdentityError as error:
                raise DeniedError(path, entry, str(error)) from None
            continue
        serial = entry.replace(":", "").lower()
        if not _SERIAL.fullmatch(serial):
            raise DeniedError(
                path, entry, "must be spiffe://... or a certificate's serial number in hexadecimal"
            )
        serials.add(int(serial, 16))
    return DenyList(version, frozenset(identities), frozenset(serials))
