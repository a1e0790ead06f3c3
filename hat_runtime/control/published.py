"""The policy of chunk sizes that an operator publishes and a cloud hands on: its JSON form, and what must hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hat_runtime.errors import FieldError
from hat_runtime.json_document import MAX_VERSION, as_integer, as_object, read_object
from hat_runtime.log import sane_device_name

MAX_DEVICES = 4096
MAX_TOKENS = 1 << 16


class PolicyError(FieldError):
    """A field of a policy cannot be used: which one, its value, and what it must be."""


@dataclass(frozen=True)
class Proposal:
    """Tokens of a chunk, between the least and the most that may be proposed."""

    chunk_tokens: int
    min_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class PublishedPolicy:
    """Chunk sizes by the name of the device (Open.device). Version 0 is none: nothing is proposed."""

    version: int = 0
    devices: Mapping[str, Proposal] = field(default_factory=dict)
    default: Proposal | None = None
    """For devices that are not named, also those without a name."""

    def chunk_for(self, device: str) -> int:
        """Tokens to propose to a device; 0: nothing."""
        proposal = self.devices.get(device, self.default)
        return 0 if proposal is None else proposal.chunk_tokens

    def to_json(self) -> str:
        """The text that `parse` reads."""
        content: dict[str, Any] = {
            "version": self.version,
            "devices": {name: vars(one) for name, one in sorted(self.devices.items())},
        }
        if self.default is not None:
            content["default"] = vars(self.default)
        return json.dumps(content, separators=(",", ":"))


def parse(text: bytes | str) -> PublishedPolicy:
    """Read a policy. Fields that are not known are ignored: a later version may have more.

    Raises:
        PolicyError: names the field and echoes its value; the first that is wrong.
    """
    root = read_object(text, "policy", PolicyError)
    devices = as_object(root.get("devices", {}), "devices", PolicyError)
    if len(devices) > MAX_DEVICES:
        raise PolicyError("devices", f"{len(devices)} devices", f"must be at most {MAX_DEVICES}")
    for name in devices:
        if sane_device_name(name) is None:
            reason = 'must be a name of letters, digits, ".", "_" and "-", at most 253 of them'
            raise PolicyError("devices", name, reason)
    default = root.get("default")
    return PublishedPolicy(
        version=as_integer(root.get("version"), "version", 0, MAX_VERSION, PolicyError),
        devices={name: _proposal(item, f"devices.{name}") for name, item in devices.items()},
        default=None if default is None else _proposal(default, "default"),
    )


def _proposal(value: object, path: str) -> Proposal:
    found = as_object(value, path, PolicyError)

    def number(key: str, least: int, most: int) -> int:
        return as_integer(found.get(key), f"{path}.{key}", least, most, PolicyError)

    least = number("min_tokens", 1, MAX_TOKENS)
    most = number("max_tokens", least, MAX_TOKENS)
    return Proposal(number("chunk_tokens", least, most), least, most)
