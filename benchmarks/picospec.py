"""Token mode over slow links: `hat bench --suite picospec` on the report sets.

    python benchmarks/picospec.py            a quarter of an hour; writes docs/benchmarks/picospec.{md,json,svg}
    python benchmarks/picospec.py --short    two prompts, one link, to see that it works; writes nothing

GSM8K and HumanEval prompts from $HAT_DATA; more options as of `hat bench`.
"""

from __future__ import annotations

import sys

from common import bench_report_sets

from hat_runtime.errors import HatError

_ABOUT = """
Greedy answers, one at a time; links of 100 Mbit/s, device and cloud pinned to one core each. Absolute times depend on
the machine; ratios are of things measured in one run. "Cloud alone" streams what the same server decodes without
drafts, and pays no round trip a token. "Synchronous" waits for each verdict. "PicoSpec" is the default: drafts while it
waits, a cloud that decodes on meanwhile, and drafting only where that is faster. The bound is what rounds of
max(T_draft, T_RTT + T_verify) would give (arXiv 2603.19133, whose published runs reach 60 to 67 % of it), from bare
passes of both models and a raw socket through the same emulated link, at the tokens a round that synchronous drafts
gave; a cloud that decodes on between rounds can exceed it. "accepted" counts drafts thrown away behind a refusal as not
accepted.
"""
_SHORT = ["--limit", "4", "--max-new-tokens", "32", "--link", "100mbit,50ms"]

if __name__ == "__main__":
    try:
        bench_report_sets(
            "picospec", ("gsm8k_test", "humaneval"), "Token mode over slow links", _ABOUT, "picospec", _SHORT
        )
    except HatError as error:
        sys.exit(f"picospec: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
