"""The hat suite's figures as Markdown and as a plot."""

from __future__ import annotations

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
    lines = [
        "| row | TTFT | limit | x | TBT | limit | x | tokens a round | acceptance | bytes a token |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        drafts = "speculation" in row.features
        lines.append(
            f"| {row.row} | {row.ttft_s * 1e3:.0f} ms | {row.ttft_limit_s * 1e3:.0f} | {row.ttft_over_limit:.2f} | "
            f"{row.tbt_s * 1e3:.1f} ms | {row.tbt_limit_s * 1e3:.1f} | {row.tbt_over_limit:.2f} | "
            f"{row.tokens_a_round:.2f} | {f'{row.acceptance:.2f}' if drafts else ''} | {row.bytes_a_token:,.0f} |"
        )
    notes = [
        f"Parts: uplink {parts.rate_up * 8e-6:.1f} Mbit/s, RTT {parts.rtt * 1e3:.1f} ms, input {parts.t_in * 1e3:.1f} "
        f"ms, cloud {parts.t_cloud * 1e3:.1f} ms, head {parts.t_head * 1e3:.1f} ms a token.",
        f"Against {base.row}: TTFT {1 - _best(rows, 'ttft_s') / base.ttft_s:.0%} less and TBT "
        f"{1 - _best(rows, 'tbt_s') / base.tbt_s:.0%} less in the best rows.",
    ]
    if slower := _slower_than_subsets(rows):
        notes.append("Slower than a row with fewer features: " + "; ".join(slower) + ".")
    plural = "session" if sessions == 1 else "sessions at a time"
    title = f"## {name}: {link.describe()}, {sessions} {plural}"
    return "\n".join([title, "", *lines, "", *notes])


def _best(rows: Sequence[Summary], name: str) -> float:
    return float(min(getattr(row, name) for row in rows))


def _slower_than_subsets(rows: Sequence[Summary]) -> list[str]:
    found = []
    for row in rows:
        for other in rows:
            if not set(other.features) < set(row.features):
                continue
            for name in ("ttft_s", "tbt_s"):
                ratio = getattr(row, name) / max(1e-9, getattr(other, name))
                if ratio > TOLERANCE:
                    found.append(f"{row.row} than {other.row} ({name[:-2].upper()} x {ratio:.2f})")
    return found


def plot(results: Sequence[Result], path: Path) -> None:
    """TBT and TTFT of every row on every link with one session, the limits as lines; SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hat"  # the same figures give the same file
    import matplotlib.pyplot as plt

    alone = [result for result in results if result[2] == 1]
    figure, axes = plt.subplots(
        2, len(alone), figsize=(3.2 * len(alone), 6.5), squeeze=False, layout="constrained"
    )
    for column, (name, _, _, _, rows) in enumerate(alone):
        labels = [row.row for row in rows]
        for axis, value, limit in (
            (axes[0][column], "ttft_s", "ttft_limit_s"),
            (axes[1][column], "tbt_s", "tbt_limit_s"),
        ):
            axis.barh(labels, [getattr(row, value) * 1e3 for row in rows], color="#4878a8")
            for place, row in enumerate(rows):
                at = getattr(row, limit) * 1e3
                axis.vlines(at, place - 0.4, place + 0.4, color="#c04020", linewidth=2)
            axis.invert_yaxis()
            axis.tick_params(labelsize=7, labelleft=column == 0)
        axes[0][column].set_title(name, fontsize=9)
        axes[0][column].set_xlabel("TTFT, ms (line: limit)", fontsize=8)
        axes[1][column].set_xlabel("TBT, ms (line: limit)", fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
