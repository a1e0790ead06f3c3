"""The policy of chunk sizes that this cloud hands on to its devices."""

from __future__ import annotations

import logging
from pathlib import Path

from hat_runtime.control.published import MAX_BYTES, PolicyError, PublishedPolicy, parse

log = logging.getLogger(__name__)


class OlderPolicy(Exception):
    """A policy that is not newer than the one in effect, and differs from it."""


class PolicyStore:
    """The policy in effect. For the event loop's thread."""

    def __init__(self) -> None:
        self.policy = PublishedPolicy()

    def put(self, text: bytes) -> PublishedPolicy:
        """Take a new policy, which is in effect from the next Result on; the same one again changes nothing.

        Raises:
            PolicyError: it is none; the one before stays.
            OlderPolicy: its version is not higher than that of the one in effect.
        """
        new, now = parse(text), self.policy
        if new == now:
            return now
        if new.version <= now.version:
            raise OlderPolicy(
                f"version: {new.version!r}: must be more than {now.version}, which is in effect"
            )
        self.policy = new
        log.info("policy %d: chunk sizes of %d devices", new.version, len(new.devices))
        return new

    def start_from(self, path: Path) -> None:
        """Take the policy of a file, as it is at the start: one that is missing or bad is logged and does no harm."""
        try:
            with path.open("rb") as file:
                self.policy = parse(file.read(MAX_BYTES + 1))
        except OSError as error:
            log.info("--policy-file %s: %s; no chunk sizes are proposed yet", path, error.strerror or error)
        except PolicyError as error:
            log.error("--policy-file %s: %s; no chunk sizes are proposed yet", path, error)
        else:
            log.info("policy %d of --policy-file %s", self.policy.version, path)
