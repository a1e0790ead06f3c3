"""How much of a text attackers recover from hidden states: `hat audit inversion` on the default model.

    python benchmarks/inversion.py            several minutes; writes docs/benchmarks/inversion.md
    python benchmarks/inversion.py --short    the short form alone, which CI repeats; writes its part of the page

The long form takes prompts of Spec-Bench, and for the attacker's own texts the articles of CNN/DailyMail, from
$HAT_DATA.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from common import REPORTS, ROOT, facts, model_folder, report

from hat_runtime.cli.audit import run_inversion
from hat_runtime.cli.main import build_parser
from hat_runtime.errors import HatError, UsageError

PAGE = REPORTS / "inversion.md"
SHORT_FORM = "## Short form"
SHORT = ["--limit", "3", "--answer-tokens", "6", "--pair-counts", "1000"]
"""As tests/runtime/test_audit.py has it."""
LONG = ["--limit", "8", "--max-prompt-tokens", "96", "--pair-counts", "1000,10000,100000"]
ABOUT = """\
What those who see hidden states recover of the text, by what else they have. **With the model's weights, hidden states
are the text**, through every codec: HAT does not transmit text and token ids, and that is all that it keeps from a
cloud, or from whoever reads the cloud's memory. [SECURITY.md](../../SECURITY.md) says what follows.

Each cell: tokens recovered, in brackets texts recovered whole. Only the user's own tokens count, not those of the
chat template. All rows go through the codec, answers too. *embedding*: the nearest embedding, an attack that is often
published alone, and that proves nothing by finding little. *pairs*: no weights, but (token, state) pairs that the
owner of any device of the fleet can make; a linear probe. *weights*: vocabulary matching, token by token with the
prefix's KV cache. *head*: final norm and head. A sampled answer is not the likeliest one, but its tokens are the next
rounds' shallow states, which *weights* reads."""
SHORT_ABOUT = """\
The same on three prompts of the audit's own, with the texts of `tests/data/prompts.jsonl` for pairs. CI repeats it and
fails where a figure is more than 5 percent away (the last row, of few tokens that a rounding may change: 25):"""


def audit(options: list[str]) -> str:
    """The command's table on the default model."""
    command = ["audit", "inversion", "--model", str(model_folder(None)), *options]
    table, _ = run_inversion(build_parser().parse_args(command))
    return table


def short() -> str:
    pairs = ["--pairs", str(ROOT / "tests" / "data" / "prompts.jsonl")]
    shown = f"    hat audit inversion --model smollm2 --pairs tests/data/prompts.jsonl {' '.join(SHORT)}"
    return f"{SHORT_FORM}\n{SHORT_ABOUT}\n\n{shown}\n\n{audit([*SHORT, *pairs])}\n"


def long() -> str:
    folder = os.environ.get("HAT_DATA")
    if not folder:
        raise UsageError("set HAT_DATA to the folder of the report sets (benchmarks/fetch_data.py fills one)")
    files = {"--prompts": "spec_bench.jsonl", "--pairs": "cnn_dm.jsonl"}
    given = [part for option, file in files.items() for part in (option, str(Path(folder) / file))]
    seen_on = facts(model_folder(None), ("torch", "transformers", "numpy"))
    return report("What hidden states give away", ABOUT, seen_on, audit([*LONG, *given]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="the short form alone")
    args = parser.parse_args()
    try:
        before = PAGE.read_text().partition(SHORT_FORM)[0] if args.short and PAGE.exists() else ""
        page = before if args.short else f"{long()}\n"
        PAGE.write_text(page + short())
    except HatError as error:
        print(f"inversion: {error}", file=sys.stderr)
        return error.exit_code
    print(PAGE.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
