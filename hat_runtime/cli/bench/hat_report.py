"""The hat suite's figures as Markdown and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from hat_runtime.cli.bench import hat_suite
from hat_runtime.cli.bench.hat_suite import Summary
from hat_runtime.cli.bench.outcome import Outcome
from hat_runtime.control.limits import LimitParts
from hat_runtime.emulation.spec import LinkSpec

Result = tuple[str, LinkSpec, int, LimitParts, list[Summary]]
"""Link's name, link, sessions, parts of the limits, rows."""
TOLERANCE = 1.05
"""A row counts as slower than another from this ratio on: repeated runs differ by about as much."""


def outcome(results: Sequence[Result]) -> Outcome:
    """A section per link and number of sessions, and a plot of one session."""
    tables = "\n\n".join(_section(*result) for result in results)
    return Outcome(tables, hat_suite.as_json(results), lambda path: plot(results, path))


def _section(name: str, link: LinkSpec, sessions: int, parts: LimitParts, rows: list[Summary]) -> str:
    base = rows[0]
    heads = [f"TTFT {source} | limit | x".replace("TTFT  |", "TTFT |") for source in base.ttft]
    lines = [
        f"| row | {' | '.join(heads)} | TBT | limit | x | round x | tokens, drafts a round | acceptance "
        "| bytes a token |"
    ]
    lines.append("| --- |" + " --- |" * (3 * len(heads) + 7))
    for row in rows:
        first = " | ".join(
            f"{ttft.median_s * 1e3:.0f} ms | {ttft.limit_s * 1e3:.0f} | {ttft.over_limit:.2f}"
            for ttft in row.ttft.values()
        )
        acceptance = f"{row.acceptance:.2f}" if "speculation" in row.features else ""
        lines.append(
            f"| {row.row} | {first} | {row.tbt_s * 1e3:.1f} ms | {row.tbt_limit_s * 1e3:.1f} | "
            f"{row.tbt_over_limit:.2f} | {row.round_over_limit:.2f} | {row.tokens_a_round:.2f}, "
            f"{row.drafts_a_round:.2f} | {acceptance} | {row.bytes_a_token:,.0f} |"
        )
    less = [
        f"TTFT {1 - min(row.ttft[source].median_s for row in rows) / ttft.median_s:.0%} less on {source or 'them'}"
        for source, ttft in base.ttft.items()
    ]
    notes = [
        f"Parts: uplink {parts.rate_up * 8e-6:.1f} Mbit/s, RTT {parts.rtt * 1e3:.1f} ms, input {parts.t_in * 1e3:.1f} "
        f"ms, cloud {parts.t_cloud * 1e3:.1f} ms, head {parts.t_head * 1e3:.1f} ms a token.",
        f"Against {base.row} in the best rows: {', '.join(less)}; TBT "
        f"{1 - min(row.tbt_s for row in rows) / base.tbt_s:.0%} less.",
    ]
    if slower := _slower_than_subsets(rows):
        notes.append("Slower than a row with fewer features: " + "; ".join(slower) + ".")
    plural = "session" if sessions == 1 else "sessions at a time"
    title = f"## {name}: {link.describe()}, {sessions} {plural}"
    return "\n".join([title, "", *lines, "", *notes])


def _slower_than_subsets(rows: Sequence[Summary]) -> list[str]:
    found = []
    for row in rows:
        for other in rows:
            if not set(other.features) < set(row.features):
                continue
            pairs = zip(row.ttfts_s, other.ttfts_s, strict=True)
            ratios = {
                "TTFT": statistics.median(ours / theirs for ours, theirs in pairs),
                "TBT": row.tbt_s / max(1e-9, other.tbt_s),
            }
            found += [
                f"{row.row} than {other.row} ({name} x {ratio:.2f})"
                for name, ratio in ratios.items()
                if ratio > TOLERANCE
            ]
    return found


def plot(results: Sequence[Result], path: Path) -> None:
    """TBT and TTFT of every row on every link with one session, the limits as lines; SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hat"  # the same figures give the same file
    import matplotlib.pyplot as plt

    alone = [result for result in results if result[2] == 1]
    sources = list(alone[0][4][0].ttft) if alone else []
    figure, axes = plt.subplots(
        len(sources) + 1,
        max(1, len(alone)),
        figsize=(3.2 * max(1, len(alone)), 3.2 * (len(sources) + 1)),
        squeeze=False,
        layout="constrained",
    )
    for column, (name, _, _, _, rows) in enumerate(alone):
        bars = [
            (f"TTFT {source}", [(row.ttft[source].median_s, row.ttft[source].limit_s) for row in rows])
            for source in sources
        ]
        bars.append(("TBT", [(row.tbt_s, row.tbt_limit_s) for row in rows]))
        for place, (title, pairs) in enumerate(bars):
            axis = axes[place][column]
            axis.barh([row.row for row in rows], [seen * 1e3 for seen, _ in pairs], color="#4878a8")
            for at, (_, limit) in enumerate(pairs):
                axis.vlines(limit * 1e3, at - 0.4, at + 0.4, color="#c04020", linewidth=2)
            axis.invert_yaxis()
            axis.tick_params(labelsize=7, labelleft=column == 0)
            axis.set_xlabel(f"{title}, ms (line: limit)", fontsize=8)
        axes[0][column].set_title(name, fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
