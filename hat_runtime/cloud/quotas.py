"""The limits in effect: those of a file, which is read again when it changes."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import yaml

from hat_runtime.control.quotas import QuotaError, Quotas, parse
from hat_runtime.errors import UsageError
from hat_runtime.json_document import MAX_BYTES

log = logging.getLogger(__name__)

EVERY_S = 2.0
"""Between two looks at the file."""
MAX_LABELS = 20
"""Tenants that have figures of their own."""
OTHERS = "other"


def read(path: Path, text: bytes | None = None) -> Quotas:
    """The limits of a file in YAML or JSON.

    Args:
        path: of the file.
        text: what it holds; None: read it.

    Raises:
        UsageError: it cannot be read, is no YAML, or a field is wrong; the text names file and field.
    """
    where = f"--quotas {path}"
    try:
        if text is None:
            with path.open("rb") as file:
                text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise UsageError(f"{where}: is too long: more than {MAX_BYTES} bytes")
        return parse(_content(text))
    except QuotaError as error:
        raise UsageError(f"{where}: {error}") from None
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        # Not YAMLErrors alone: a date such as 2026-11-31, `!!bool x` or a number of 5,000 digits.
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UsageError(f"{where}: must be YAML or JSON: {place}{problem}") from None


def _content(text: bytes) -> object:
    try:
        return json.loads(text)  # apart, since YAML 1.1 takes the number 1e-06 for a text
    except ValueError:
        return yaml.safe_load(text)


class QuotaStore:
    """The limits in effect; any thread may read `current`."""

    def __init__(self, path: Path | None = None) -> None:
        """Read the file; without one nobody is limited.

        Raises:
            UsageError: as `read`.
        """
        self._path = path
        self._text = b""
        self._labels: dict[str, None] = {}
        self.current = Quotas()
        if path is not None:
            self._take(read(path))

    def label(self, tenant: str) -> str | None:
        """Under which name a tenant is counted: its own for the first MAX_LABELS of the file; None: nobody is."""
        if self._path is None:
            return None
        return tenant if tenant in self._labels else OTHERS

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Follow the file until the context ends. One that is wrong or gone is logged, and the limits stay."""
        if self._path is None:
            yield
            return
        task = asyncio.create_task(self._follow(self._path))
        try:
            yield
        finally:
            task.cancel()

    async def _follow(self, path: Path) -> None:
        said = ""
        text = None
        while True:
            before = text
            try:
                text = await asyncio.to_thread(path.read_bytes)
                if text != before:
                    new = read(path, text)
                    if new != self.current:
                        self._take(new)
                        log.info("--quotas %s: new limits are in effect", path)
                    said = ""
            except (OSError, UsageError) as error:
                if str(error) != said:
                    log.error("%s; the limits stay as they are", error)
                said = str(error)
            except Exception:
                log.exception("--quotas %s: the limits stay as they are", path)
            await asyncio.sleep(EVERY_S)

    def _take(self, quotas: Quotas) -> None:
        for name in quotas.tenants:
            if len(self._labels) < MAX_LABELS:
                self._labels[name] = None
        self.current = quotas
