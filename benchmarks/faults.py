"""The fault-injection suite: concurrent answers while something breaks, compared with the whole model's texts.

A tiny random model in float32, `hat cloud serve` in a process of its own behind an emulated link, the device in this
process; greedy and seeded answers in turn. Writes docs/benchmarks/faults.md. Exits with 1 if an answer was wrong, or
something was left over.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from common import REPORTS, ROOT, facts, progress, report, table

sys.path.insert(0, str(ROOT))  # the scene of the tests

from tests.runtime.faulting import (
    FAULTS,
    LINK,
    LONG_ONLY,
    NEW,
    TTL_S,
    Fault,
    Tally,
    scene,
    strike,
    whole_text,
)
from tests.tiny_drafters import perturbed
from tests.tiny_models import make_tiny_model

MODES = ("hat", "picospec")
Row = tuple[str, str, Tally]
"""Mode, fault, what came of it."""
ABOUT = f"""
{{count}} concurrent answers of {NEW} tokens of a tiny random model in float32, greedy and seeded (`coupled`) in
turn, over an emulated link of {LINK} (rate, round trip). When a quarter of the tokens is there, something
breaks. *exact*: the answer is the whole model's text, by transformers alone. *told*: it ended with the error
that the contract allows, and what came before was right. *wrong*: everything else, and pages or sessions that
are left over on either side afterwards. Recoveries are the device's `hat_session_resumes_total` by cause. A
session is kept for {TTL_S:g} s after its stream was lost (60 s in the row of 30 s), the watchdog waits 4 s.
Seconds are from the start of the answers to the last one's end, on a machine that does other things as well.
"""


async def measured(
    model: Path, draft: Path, count: int, only: str, seen: Callable[[list[Row]], None]
) -> list[Row]:
    """Every fault in both modes; `seen` is told after each."""
    want, rows = whole_text(model), list[Row]()
    faults: dict[str, Fault] = {name: fault for name, fault in (FAULTS | LONG_ONLY).items() if only in name}
    for mode in MODES:
        drafter = str(draft) if mode == "picospec" else f"model:{draft}"
        for options in dict.fromkeys(fault.options for fault in faults.values()):
            async with scene(mode, model, drafter, options) as there:
                for name, fault in faults.items():
                    if fault.options == options:
                        tally = await strike(there, name, fault, want, count)
                        progress(f"{mode}: {name}: {tally}")
                        rows.append((mode, name, tally))
                        seen(rows)
    return rows


def results(rows: list[Row]) -> str:
    """The table."""
    order = list(FAULTS | LONG_ONLY)
    return table(
        ["mode", "fault", "exact", "told", "wrong", "recoveries", "seconds"],
        [
            [
                mode,
                name,
                tally.exact,
                tally.told,
                len(tally.wrong),
                ", ".join(f"{count} {cause}" for cause, count in tally.recoveries.items() if count) or "-",
                f"{tally.seconds:.1f}",
            ]
            for mode, name, tally in sorted(rows, key=lambda row: (MODES.index(row[0]), order.index(row[1])))
        ],
    )


def main() -> int:
    """Run the suite; 1 if something was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=int, default=20, help="at once (default %(default)s)")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="faults with this in their name; no report"
    )
    args = parser.parse_args()
    about = facts(None)

    def write(rows: list[Row]) -> None:
        if not args.only:
            title, text = "Faults in the middle of answers", ABOUT.format(count=args.answers)
            (REPORTS / "faults.md").write_text(report(title, text, about, results(rows)))

    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model("llama", Path(folder) / "tiny")
        draft = perturbed(model, Path(folder) / "close", 0.005)
        rows = asyncio.run(measured(model, draft, args.answers, args.only, write))
    print(results(rows))
    return 1 if any(tally.wrong for _, _, tally in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
