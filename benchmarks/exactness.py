"""Do a device and a cloud give the tokens that the whole model gives? (float32, greedy)

    python benchmarks/exactness.py                          40 Spec-Bench prompts from $HAT_DATA
    python benchmarks/exactness.py --drafting               every drafter over slow links; 20 HumanEval prompts too
    python benchmarks/exactness.py --prompts tests/data/prompts.jsonl --limit 4 --max-new-tokens 24

The reference is `hat generate --local`: transformers' from_pretrained and generate. Matrix kernels differ with the
number of rows, so bits may differ; token ids may then differ only where the reference's own two best logits lie closer
than GAP, and in at most one prompt of a hundred.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import REPORTS, facts, model_folder, progress, report, table

from hat_runtime.cli.processes import Children, free_address, hat_command
from hat_runtime.data import Prompt, read_prompts
from hat_runtime.emulation.link import EmulatedLink
from hat_runtime.emulation.spec import LinkSpec
from hat_runtime.errors import HatError, UsageError
from hat_runtime.model.draft_model import shipped_draft_model

GAP = 1e-3
LOOPBACK = ""
LINKS = (LOOPBACK, "100mbit,20ms", "100mbit,100ms,5ms")
"""The last one with jitter."""
DRAFTERS = ("ngram", "adapter", "feature", "hybrid", "model")
WINDOWS = ("1", "2", "auto")
BRANCHES = ("1", "3")
ALTERNATIVES = ("0", "2", "auto")


@dataclass(frozen=True)
class Setting:
    """One way to send all prompts through the cloud."""

    name: str
    options: tuple[str, ...]
    """Of `hat generate`."""
    link: str = LOOPBACK


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

    setting: Setting
    tokens: int
    rounds: int
    seconds: float
    differences: list[Difference]

    @property
    def passed(self) -> bool:
        """Within the rule above."""
        return all(difference.gap < GAP for difference in self.differences)


def plain_settings() -> list[Setting]:
    """Without drafts: sessions in one pass, and chunks."""
    ways = ((1, 128), (8, 32))
    return [
        Setting(f"{count} at a time, chunks of {chunk}", ("--drafter", "none", *_load(count, chunk)))
        for count, chunk in ways
    ]


def drafting_settings(draft_model: Path) -> list[Setting]:
    """A pairwise cover of drafters, windows, branches, alternatives and links: every two values meet in a setting."""
    settings = []
    for (d, drafter), (w, window) in itertools.product(enumerate(DRAFTERS), enumerate(WINDOWS)):
        branches, link = BRANCHES[(d + w) % len(BRANCHES)], LINKS[(d + w) % len(LINKS)]
        named = f"model:{draft_model}" if drafter == "model" else drafter
        others = ALTERNATIVES[(d + 2 * w) % len(ALTERNATIVES)]
        how = ("--drafter", named, "--window", window, "--branches", branches, "--max-draft", "4")
        options = (*how, "--alternatives", others, *_load(8, 128))
        name = f"{drafter}, window {window}, {branches} branch{'es' if branches != '1' else ''}"
        name += f", alternatives {others}"
        settings.append(Setting(f"{name}, {link or 'loopback'}", options, link))
    return settings


def _load(concurrency: int, chunk_tokens: int) -> tuple[str, ...]:
    return "--concurrency", str(concurrency), "--chunk-tokens", str(chunk_tokens)


def main() -> int:
    args = _arguments()
    model = model_folder(args.model)
    settings = drafting_settings(shipped_draft_model(model)) if args.drafting else plain_settings()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "prompts.jsonl"
        _merge(args.prompts, args.limit, file)
        prompts = read_prompts(file)
        common = ["--prompts", str(file), "--model", str(model), "--dtype", "float32", "--json"]
        common += ["--max-new-tokens", str(args.max_new_tokens)]
        progress(f"reference: {len(prompts)} prompts, up to {args.max_new_tokens} new tokens")
        reference = _generate([*common, "--local"])
        with Children() as children:
            address, http = free_address(), free_address()
            split = ["--input-layers", str(args.input_layers), "--dtype", "float32"]
            serve = [
                "cloud",
                "serve",
                "--model",
                str(model),
                *split,
                "--listen",
                address,
                "--http-listen",
                http,
            ]
            children.start("cloud", hat_command(*serve)).wait_ready(f"http://{http}/readyz")
            runs = []
            for setting in settings:
                progress(f"cloud: {setting.name}")
                runs.append(_run(setting, common, address, model, prompts, reference))
    text = report("Exactness of the split model", _about(args, reference), facts(model), _body(runs))
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
    different = sum(len(run.differences) for run in runs)
    return 0 if all(run.passed for run in runs) and different * 100 <= len(prompts) * len(runs) else 1


def _merge(files: Sequence[Path], limits: Sequence[int], out: Path) -> None:
    """The first prompts of every file, in one."""
    chosen = []
    for file, limit in zip(files, limits, strict=True):
        read_prompts(file, limit)  # complains of what is wrong, by file and line
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        chosen += lines[:limit]
    out.write_text("\n".join(chosen) + "\n", encoding="utf-8")


def _run(
    setting: Setting,
    common: Sequence[str],
    address: str,
    model: Path,
    prompts: Sequence[Prompt],
    reference: Sequence[dict[str, Any]],
) -> Run:
    with _through(setting.link, address) as to:
        began = time.monotonic()
        answers = _generate([*common, "--cloud", to, *setting.options])
        seconds = time.monotonic() - began
    tokens = sum(len(answer["token_ids"]) for answer in answers)
    rounds = sum(answer["rounds"] for answer in answers)
    return Run(setting, tokens, rounds, seconds, _compare(model, prompts, reference, answers))


@contextlib.contextmanager
def _through(link: str, address: str) -> Iterator[str]:
    if link == LOOPBACK:
        yield address
        return
    with EmulatedLink(address, LinkSpec.parse(link)) as emulated:
        yield emulated.address


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
    model: Path,
    prompts: Sequence[Prompt],
    reference: Sequence[dict[str, Any]],
    answers: Sequence[dict[str, Any]],
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


def _about(args: argparse.Namespace, reference: Sequence[dict[str, Any]]) -> str:
    tokens = sum(len(record["token_ids"]) for record in reference)
    files = " and ".join(
        f"{limit} of {file.name}" for file, limit in zip(args.prompts, args.limit, strict=True)
    )
    return f"""
Token ids of `hat generate --cloud` (device and cloud as two processes) against `hat generate --local` (transformers'
own generate on the whole model), float32, greedy, {args.input_layers} layers on the device. Where an answer leaves the
reference, the reference's two best logits must lie closer than {GAP:g}, and that in at most one answer of a hundred.
Prompts: {files}, up to {args.max_new_tokens} new tokens; {tokens:,} tokens in the reference.
"""


def _body(runs: Sequence[Run]) -> str:
    columns = [
        "how",
        "tokens",
        "tokens a round",
        "seconds",
        "answers that differ",
        "largest gap where they do",
    ]
    rows = []
    for run in runs:
        gap = f"{max(d.gap for d in run.differences):.1e}" if run.differences else "-"
        pace = f"{run.tokens / run.rounds:.2f}"
        rows.append([run.setting.name, run.tokens, pace, f"{run.seconds:.0f}", len(run.differences), gap])
    where = [
        f"Different: {run.setting.name}: prompt {d.prompt.id} from token {d.index} on, gap {d.gap:.1e}"
        for run in runs
        for d in run.differences
    ]
    return "\n\n".join([table(columns, rows), *where])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--drafting", action="store_true", help="with every drafter, over slow links")
    parser.add_argument(
        "--prompts", type=Path, nargs="+", help="default: Spec-Bench (and HumanEval) in $HAT_DATA"
    )
    parser.add_argument("--limit", type=int, nargs="+", help="of each file (default 40, HumanEval 20)")
    parser.add_argument("--max-new-tokens", type=int, help="default 64, with --drafting 32")
    parser.add_argument("--input-layers", type=int, default=3)
    parser.add_argument("--model", type=Path, help="default: the default model")
    parser.add_argument("--out", type=Path, help="write the table there as well")
    args = parser.parse_args()
    args.max_new_tokens = args.max_new_tokens or (32 if args.drafting else 64)
    if args.prompts is None:
        if not os.environ.get("HAT_DATA"):
            raise UsageError(
                "set HAT_DATA to the folder with spec_bench.jsonl (benchmarks/fetch_data.py), or give --prompts"
            )
        names = ("spec_bench.jsonl", "humaneval.jsonl") if args.drafting else ("spec_bench.jsonl",)
        args.prompts = [Path(os.environ["HAT_DATA"]) / name for name in names]
        args.out = args.out or REPORTS / ("drafting_exactness.md" if args.drafting else "exactness.md")
    args.limit = args.limit or [40, 20, *[20] * len(args.prompts)][: len(args.prompts)]
    if len(args.limit) == 1:
        args.limit *= len(args.prompts)
    if len(args.limit) != len(args.prompts):
        raise UsageError(
            f"--limit {args.limit}: give one number, or one for each of {len(args.prompts)} files"
        )
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HatError as error:
        sys.exit(f"exactness: {error}")
