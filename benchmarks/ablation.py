"""HAT's ablation and what goes beyond it, over four links, beside the limits: `hat bench` on the report sets.

    python benchmarks/ablation.py            some twenty minutes; writes docs/benchmarks/ablation.{md,json,svg}
    python benchmarks/ablation.py --short    two prompts on one link; writes nothing

Spec-Bench and CNN/DM prompts from $HAT_DATA; more options as of `hat bench`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from common import REPORTS, facts, model_folder, report, warn_if_busy

from hat_runtime.cli.bench import command
from hat_runtime.cli.bench import report as tables
from hat_runtime.cli.main import build_parser
from hat_runtime.errors import HatError, UsageError

_ABOUT = """
Device and cloud pinned to one core each, greedy. Times are the device's own; TTFT is the median over prompts, TBT the
mean over all tokens. The limits (hat_runtime/control/limits.py) are made of bare transformers layers on the same cores
and raw sockets through the same emulated link, measured in the same run; those of rows that draft hold at the row's own
acceptance. With several sessions at a time the limits are still those of one. `x` is measured / limit.
"""


def main() -> int:
    folder = os.environ.get("HAT_DATA")
    if not folder:
        raise UsageError("set HAT_DATA to the folder of the report sets (benchmarks/fetch_data.py fills one)")
    options = sys.argv[1:]
    short = "--short" in options
    if short:
        options.remove("--short")
        options += ["--limit", "2", "--max-new-tokens", "8", "--sessions", "1", "--link", "60mbit,10ms"]
    for name in ("spec_bench", "cnn_dm"):
        options += ["--prompts", str(Path(folder) / f"{name}.jsonl")]
    warn_if_busy()
    args = build_parser().parse_args(["bench", *options])
    results = command.run_hat_suite(args)
    body = tables.as_markdown(results)
    print(body)
    if not short:
        plot = "\n\n![TTFT and TBT of every row](ablation.svg)"
        text = report("Ablation", _ABOUT, facts(model_folder(None)), body + plot)
        command.write(results, REPORTS / "ablation.md", text)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HatError as error:
        sys.exit(f"ablation: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
