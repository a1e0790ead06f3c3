"""The picospec suite's figures as Markdown, as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hat_runtime.cli.bench.outcome import Outcome
from hat_runtime.cli.bench.picospec_suite import ALONE, SYNCHRONOUS, Parts, Row

_COLUMNS = (
    "prompts",
    "link",
    "way",
    "tokens/s",
    "to cloud alone",
    "to synchronous",
    "accepted",
    "of the bound",
)


def outcome(parts: Parts, rows: Sequence[Row], gamma: int) -> Outcome:
    """Everything that can be shown of a run."""
    figures = {
        "parts": asdict(parts),
        "rows": [asdict(row) | {"share_of_bound": share_of_bound(row, rows)} for row in rows],
    }
    return Outcome(
        _markdown(parts, rows, gamma), json.dumps(figures, indent=2), lambda path: _plot(rows, path)
    )


def share_of_bound(row: Row, rows: Sequence[Row]) -> float:
    """Tokens a second over what rounds of max(T_draft, T_RTT + T_verify) would give.

    A round gives as many tokens as one with synchronous drafts did: that depends on the draft model alone. A cloud that
    decodes by itself between rounds can exceed the bound.
    """
    rounds = _same(row, rows, SYNCHRONOUS)
    return row.tokens_per_s * row.bound_s / rounds.tokens_a_round if rounds.tokens_a_round else 0.0


def _same(row: Row, rows: Sequence[Row], way: str) -> Row:
    return next(one for one in rows if (one.prompts, one.link, one.way) == (row.prompts, row.link, way))


def _markdown(parts: Parts, rows: Sequence[Row], gamma: int) -> str:
    lines = [_line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
    for row in sorted(rows, key=lambda row: (row.prompts, parts.rtt_s[row.link])):
        alone, waiting = _same(row, rows, ALONE), _same(row, rows, SYNCHRONOUS)
        drafts = row.way != ALONE
        lines.append(
            _line(
                [
                    row.prompts,
                    row.link,
                    row.way,
                    f"{row.tokens_per_s:.1f}",
                    f"{row.tokens_per_s / alone.tokens_per_s:.2f}",
                    f"{row.tokens_per_s / waiting.tokens_per_s:.2f}",
                    f"{row.accepted:.0%}" if drafts else "",
                    f"{share_of_bound(row, rows):.0%}" if drafts else "",
                ]
            )
        )
    waits = ", ".join(
        f"{row.tokens_a_round:.2f} ({row.prompts}, {row.link})" for row in rows if row.way == SYNCHRONOUS
    )
    bound_s = {row.link: row.bound_s for row in rows}
    bounds = ", ".join(f"{seconds * 1e3:.0f} ms ({link})" for link, seconds in bound_s.items())
    return "\n".join(
        [
            *lines,
            "",
            f"Bare passes on one core: a draft {parts.draft_s * 1e3:.1f} ms, the large model "
            f"{parts.one_s * 1e3:.1f} ms for one token and {parts.verify_s * 1e3:.1f} ms for {gamma}. "
            f"Bound of a round: {bounds}.",
            f"Tokens of a synchronous round: {waits}.",
        ]
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Tokens a second of every way, a panel for each set of prompts; SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hat"  # the same figures give the same file
    import matplotlib.pyplot as plt

    sets = list(dict.fromkeys(row.prompts for row in rows))
    ways = list(dict.fromkeys(row.way for row in rows))
    links = list(dict.fromkeys(row.link for row in rows))
    figure, axes = plt.subplots(
        1, len(sets), figsize=(4.2 * len(sets), 3.2), squeeze=False, layout="constrained", sharey=True
    )
    for axis, name in zip(axes[0], sets, strict=True):
        for number, way in enumerate(ways):
            chosen = {row.link: row.tokens_per_s for row in rows if (row.prompts, row.way) == (name, way)}
            places = [index + (number - 1) * 0.27 for index in range(len(links))]
            axis.bar(places, [chosen[link] for link in links], width=0.25, label=way)
        axis.set_xticks(range(len(links)), links, fontsize=7)
        axis.set_title(name, fontsize=9)
    axes[0][0].set_ylabel("tokens/s", fontsize=8)
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
