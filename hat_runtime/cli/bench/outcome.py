"""What a suite has measured, ready to be shown and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """Tables, figures and a plot of the same measurements."""

    markdown: str
    json: str
    plot: Callable[[Path], None]
    """Writes an SVG; ImportError without matplotlib."""

    def write(self, out: Path, text: str) -> None:
        """`text`, which holds the tables, as FILE.md; figures as FILE.json, and where matplotlib is, FILE.svg."""
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
        out.with_suffix(".json").write_text(self.json + "\n", encoding="utf-8")
        try:
            self.plot(out.with_suffix(".svg"))
        except ImportError:
            print("no plot: matplotlib is not installed")
