"""HAT's ablation and what goes beyond it, over four links, beside the limits: `hat bench` on the report sets.

    python benchmarks/ablation.py            some twenty minutes; writes docs/benchmarks/ablation.{md,json,svg}
    python benchmarks/ablation.py --short    two prompts on one link; writes nothing

Spec-Bench and CNN/DM prompts from $HAT_DATA; more options as of `hat bench`.
"""

from __future__ import annotations

import sys

from common import bench_report_sets

from hat_runtime.errors import HatError

_ABOUT = """
Device and cloud pinned to one core each, greedy. Times are the device's own; TTFT is the median over the prompts of a
set, TBT the mean over all tokens. The limits (hat_runtime/control/limits.py) are made of bare transformers layers on
the same cores, for first tokens at each prompt's own length, and raw sockets through the same emulated link, measured
in the same run. Those of rows that draft hold for an endless supply of drafts of the row's own acceptance; `round x`
is a round's time over that of bare layers and link for as many drafts as it had, made before it left. With several
sessions at a time the limits are still those of one. `x` is measured / limit.
"""
_SHORT = ["--limit", "2", "--max-new-tokens", "8", "--sessions", "1", "--link", "60mbit,10ms"]

if __name__ == "__main__":
    try:
        bench_report_sets("hat", ("spec_bench", "cnn_dm"), "Ablation", _ABOUT, "ablation", _SHORT)
    except HatError as error:
        sys.exit(f"ablation: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
