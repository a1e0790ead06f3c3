"""The policy of chunk sizes that this cloud hands on to its devices."""

from __future__ import annotations

import logging
from pathlib import Path

from hat_runtime.cloud.documents import DocumentStore
from hat_runtime.control.published import PolicyError, PublishedPolicy, parse
from hat_runtime.json_document import MAX_BYTES

log = logging.getLogger(__name__)


class PolicyStore(DocumentStore[PublishedPolicy]):
    """The policy in effect, from the next Result on."""

    def __init__(self) -> None:
        super().__init__(PublishedPolicy(), parse, MAX_BYTES)

    def changed(self, new: PublishedPolicy) -> None:
        """Log it."""
        log.info("policy %d: chunk sizes of %d devices", new.version, len(new.devices))

    def start_from(self, path: Path) -> None:
        """Take the policy of a file, as it is at the start: one that is missing or bad is logged and does no harm."""
        try:
            with path.open("rb") as file:
                self.current = parse(file.read(MAX_BYTES + 1))
        except OSError as error:
            log.info("--policy-file %s: %s; no chunk sizes are proposed yet", path, error.strerror or error)
        except PolicyError as error:
            log.error("--policy-file %s: %s; no chunk sizes are proposed yet", path, error)
        else:
            log.info("policy %d of --policy-file %s", self.current.version, path)
