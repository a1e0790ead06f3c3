"""The audit's figures for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hat_runtime.audit.inversion import Figure


def table(figures: Sequence[Figure]) -> str:
    """A Markdown table: an attack a row, a codec a column: share of the tokens recovered (whole texts)."""
    codecs = list(dict.fromkeys(figure.codec for figure in figures))
    rows: dict[tuple[str, str], dict[str, Figure]] = {}
    for figure in figures:
        rows.setdefault((figure.knowledge, figure.detail), {})[figure.codec] = figure
    lines = [["attacker has", "and reads", *codecs], ["---"] * (2 + len(codecs))]
    for (knowledge, detail), cells in rows.items():
        lines.append([knowledge, detail, *(_cell(cells[codec]) for codec in codecs)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def timings(figures: Sequence[Figure]) -> str:
    """A Markdown table of the attacks' seconds for each token, over all codecs."""
    rows: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        rows.setdefault((figure.knowledge, figure.detail), []).append(figure)
    lines = [["attacker has", "and reads", "ms a token"], ["---"] * 3]
    for (knowledge, detail), cells in rows.items():
        each = sum(cell.seconds for cell in cells) / sum(cell.tokens for cell in cells)
        lines.append([knowledge, detail, f"{1000 * each:.3g}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_json(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """One object for each attack and codec."""
    return [
        {
            "knowledge": figure.knowledge,
            "reads": figure.detail,
            "codec": figure.codec,
            "tokens": figure.tokens,
            "recovered": figure.recovered,
            "share": figure.share,
            "texts": figure.texts,
            "exact": figure.exact,
            "seconds_per_token": figure.seconds / figure.tokens,
        }
        for figure in figures
    ]


def _cell(figure: Figure) -> str:
    return f"{100 * figure.share:.1f} % ({figure.exact} of {figure.texts})"
