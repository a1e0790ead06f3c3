"""Do a device and a cloud give the tokens that the whole model gives? (float32, greedy)

    python benchmarks/exactness.py                          40 Spec-Bench prompts from $HAT_DATA
    python benchmarks/exactness.py --prompts tests/data/prompts.jsonl --limit 4 --max-new-tokens 24

The reference is `hat generate --local`: transformers' from_pretrained and generate. Matrix kernels differ with the
number of rows, so bits may differ; token ids may then differ only where the reference's own two best logits lie closer
than GAP, and in at most one prompt of a hundred.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hat_runtime.cli.processes import Children, free_address, hat_command
from hat_runtime.data import Prompt, read_prompts
from hat_runtime.errors import HatError, UsageError
from hat_runtime.model.prepare import prepare

ROOT = Path(__file__).resolve().parent.parent
GAP = 1e-3
RUNS = ((1, 128), (8, 32))
"""(prompts at a time, tokens of a prompt chunk)."""


@dataclass(frozen=True)
class Difference:
    """The first token at which an answer leaves the reference."""

    prompt: Prompt
    index: int
    gap: float
    """Between the reference's two best logits there."""


@dataclass(frozen=True)
class Run:
    """All prompts once through the cloud."""

    concurrency: int
    chunk_tokens: int
    tokens: int
    seconds: float
    differences: list[Difference]

    @property
    def passed(self) -> bool:
        """Within the rule above."""
        return all(difference.gap < GAP for difference in self.differences)


def main() -> int:
    args = _arguments()
    model = args.model or prepare("default")
    prompts = read_prompts(args.prompts, args.limit)
    common = ["--prompts", str(args.prompts), "--model", str(model), "--dtype", "float32", "--json"]
    common += ["--limit", str(args.limit), "--max-new-tokens", str(args.max_new_tokens)]
    print(f"reference: {len(prompts)} prompts, up to {args.max_new_tokens} new tokens", file=sys.stderr)
    reference = _generate([*common, "--local"])
    runs = []
    with Children() as children:
        address, http = free_address(), free_address()
        split = ["--input-layers", str(args.input_layers), "--dtype", "float32"]
        serve = ["cloud", "serve", "--model", str(model), *split, "--listen", address, "--http-listen", http]
        children.start("cloud", hat_command(*serve)).wait_ready(f"http://{http}/readyz")
        for concurrency, chunk in RUNS:
            print(f"cloud: {concurrency} at a time, chunks of {chunk}", file=sys.stderr)
            how = ["--cloud", address, "--concurrency", str(concurrency), "--chunk-tokens", str(chunk)]
            began = time.monotonic()
            answers = _generate([*common, *how])
            seconds = time.monotonic() - began
            differences = _compare(model, prompts, reference, answers)
            runs.append(
                Run(concurrency, chunk, sum(len(a["token_ids"]) for a in answers), seconds, differences)
            )
    table = _table(args, model, reference, runs)
    print(table)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(table, encoding="utf-8")
    different = {difference.prompt.id for run in runs for difference in run.differences}
    return 0 if all(run.passed for run in runs) and len(different) * 100 <= len(prompts) else 1


def _generate(arguments: list[str]) -> list[dict[str, Any]]:
    """Run `hat generate`; every prompt must have an answer."""
    done = subprocess.run(hat_command("generate", *arguments), stdout=subprocess.PIPE, text=True, check=False)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    errors = [record for record in records if "error" in record]
    if done.returncode or errors:
        raise HatError(
            f"hat generate failed: {errors[0]['error'] if errors else f'exit code {done.returncode}'}"
        )
    return records


def _compare(
    model: Path, prompts: list[Prompt], reference: list[dict[str, Any]], answers: list[dict[str, Any]]
) -> list[Difference]:
    differences = []
    for prompt, expected, answer in zip(prompts, reference, answers, strict=True):
        if (expected["id"], expected["prompt_tokens"]) != (answer["id"], answer["prompt_tokens"]):
            raise HatError(f"prompt {prompt.id} was read or tokenised in two ways")
        index = first_difference(expected["token_ids"], answer["token_ids"])
        if index is not None:
            gap = _top_gap(model, prompt, expected["token_ids"][:index])
            differences.append(Difference(prompt, index, gap))
    return differences


def first_difference(expected: list[int], found: list[int]) -> int | None:
    """The first index at which two answers differ, one of them ending included; None if they are equal."""
    if expected == found:
        return None
    pairs = zip(expected, found, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))


def _top_gap(model: Path, prompt: Prompt, answer: list[int]) -> float:
    """Distance of the whole model's two best logits after prompt and `answer`."""
    import torch

    from hat_runtime.model.reference import LocalModel

    whole = LocalModel(model, torch.float32)
    ids = torch.tensor([whole.encode(prompt.text, prompt.chat) + answer])
    with torch.inference_mode():
        best = whole.model(ids).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])


def _table(args: argparse.Namespace, model: Path, reference: list[dict[str, Any]], runs: list[Run]) -> str:
    tokens = sum(len(record["token_ids"]) for record in reference)
    lines = [
        "# Exactness of the split model",
        "",
        "Token ids of `hat generate --cloud` (device and cloud as two processes) against `hat generate --local`",
        "(transformers' own generate on the whole model), float32, greedy. Where an answer leaves the reference, the",
        f"reference's two best logits must lie closer than {GAP:g}, and that in at most one prompt of a hundred.",
        "",
        f"- model: {model.name}, {args.input_layers} layers on the device",
        f"- prompts: {len(reference)} of {args.prompts.name}, up to {args.max_new_tokens} new tokens; "
        f"{tokens} tokens in the reference",
        f"- commit: {_commit()}",
        f"- machine: {_machine()}",
        f"- command: `{_command()}`",
        "",
        "| prompts at a time | chunk | tokens | seconds | answers that differ | largest gap where they do |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        gap = f"{max(d.gap for d in run.differences):.1e}" if run.differences else "-"
        row = (run.concurrency, run.chunk_tokens, run.tokens, f"{run.seconds:.0f}", len(run.differences), gap)
        lines.append(f"| {' | '.join(map(str, row))} |")
    lines += [
        f"\nDifferent: prompt {d.prompt.id} from token {d.index} on, gap {d.gap:.1e}"
        for r in runs
        for d in r.differences
    ]
    return "\n".join(lines) + "\n"


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _command() -> str:
    threads = os.environ.get("OMP_NUM_THREADS")
    words = shlex.join(["python", "benchmarks/exactness.py", *sys.argv[1:]])
    return f"OMP_NUM_THREADS={threads} {words}" if threads else words


def _machine() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return f"{model}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=Path, help="default: $HAT_DATA/spec_bench.jsonl")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--input-layers", type=int, default=3)
    parser.add_argument("--model", type=Path, help="default: the default model")
    parser.add_argument("--out", type=Path, help="write the table there as well")
    args = parser.parse_args()
    if args.prompts is None:
        if not os.environ.get("HAT_DATA"):
            raise UsageError(
                "set HAT_DATA to the folder with spec_bench.jsonl (benchmarks/fetch_data.py), or give --prompts"
            )
        args.prompts = Path(os.environ["HAT_DATA"]) / "spec_bench.jsonl"
        args.out = args.out or ROOT / "docs" / "benchmarks" / "exactness.md"
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HatError as error:
        sys.exit(f"exactness: {error}")
