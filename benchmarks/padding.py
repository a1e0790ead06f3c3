"""What sizes of messages tell whoever watches the network, with and without --pad-frames, and what padding costs.

    python benchmarks/padding.py            some minutes; writes docs/benchmarks/padding.md
    python benchmarks/padding.py --short    two prompts, to see that it works; writes nothing

A real device and a real cloud answer prompts of tests/data, each several times with other seeds. The observer sees
size and direction of each message, in order. From them it guesses how many drafts a round had, how many of them were
accepted, and which prompt it was.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import statistics
import sys
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import REPORTS, ROOT, facts, model_folder, progress, report, table

from hat_runtime.cloud.serve import CloudConfig, running_cloud
from hat_runtime.data import read_prompts
from hat_runtime.device.chat import PromptEncoder
from hat_runtime.device.connect import connect
from hat_runtime.device.generator import GenerationRequest, Generator, GeneratorConfig
from hat_runtime.device.policy import DraftConfig
from hat_runtime.device.sampling import SamplingParams
from hat_runtime.errors import HatError
from hat_runtime.model.hf import load_tokenizer

INPUT_LAYERS = 3
TEMPERATURE = 0.7
FOLDS = 5
SHUFFLES = 20
SETTINGS = {
    "plain": (False, None),
    "padded": (True, None),
    "plain, no alternatives": (False, 0),
    "padded, no alternatives": (True, 0),
}
"""--pad-frames, --alternatives."""


@dataclass
class Round:
    """A round as it was, and what was seen of it."""

    drafts: int
    accepted: int
    seen: tuple[int, ...]
    """Sizes of its Step, of its Result, and of the next Step, in rows."""


@dataclass
class Trace:
    """One answer."""

    prompt: int
    sizes: list[int] = field(default_factory=list)
    """Of all messages in order, in rows; those that went down are negative."""
    rounds: list[Round] = field(default_factory=list)
    tokens: int = 0
    up: int = 0
    down: int = 0


class Watch:
    """Takes the place of a counter of bytes: it is told the size of each message."""

    def __init__(self, counter: Any, events: list[tuple[str, int, int]], direction: str) -> None:
        self._counter, self._events, self._direction = counter, events, direction

    def inc(self, size: int) -> None:
        self._counter.inc(size)
        self._events.append((self._direction, size, 0))


def watch(generator: Generator) -> list[tuple[str, int, int]]:
    """("up" or "down", bytes, 0) for each message and ("judged", drafts, accepted) for each round, in order."""
    events: list[tuple[str, int, int]] = []
    link, metrics = generator.link, generator.link.metrics
    metrics.uplink_bytes = Watch(metrics.uplink_bytes, events, "up")  # type: ignore[assignment]
    metrics.downlink_bytes = Watch(metrics.downlink_bytes, events, "down")  # type: ignore[assignment]
    saw_drafts = link.saw_drafts

    def judged(accepted: int, drafted: int) -> None:
        saw_drafts(accepted, drafted)
        events.append(("judged", drafted, accepted))

    link.saw_drafts = judged  # type: ignore[method-assign]
    return events


def trace(prompt: int, events: Sequence[tuple[str, int, int]], row_bytes: int, tokens: int) -> Trace:
    """One answer's events as a trace. The first that was judged is the prompt's end, no round."""
    found = Trace(prompt, tokens=tokens)
    steps: list[int] = []
    results: list[int] = []
    truths: list[tuple[int, int, int]] = []
    for kind, size, accepted in events:
        if kind == "judged":
            truths.append((size, accepted, len(steps) - 1))
            continue
        rows = size // row_bytes
        found.sizes.append(rows if kind == "up" else -rows)
        if kind == "up":
            found.up += size
            steps.append(rows)
        else:
            found.down += size
            results.append(rows)
    for drafts, accepted, step in truths[1:]:
        result = step - len(steps) + len(results)
        following = steps[step + 1] if step + 1 < len(steps) else 0
        found.rounds.append(
            Round(drafts, accepted, (steps[step], results[min(result, len(results) - 1)], following))
        )
    return found


async def measure(folder: Path, pad: bool, alternatives: int | None, args: argparse.Namespace) -> list[Trace]:
    """Answers to all prompts with all seeds."""
    encoder = PromptEncoder(load_tokenizer(folder))
    prompts = read_prompts(ROOT / "tests" / "data" / "prompts.jsonl", args.limit)
    config = GeneratorConfig(
        max_idle_conversations=0,
        # One round in flight, nothing drafted meanwhile: otherwise it is not plain which Step a count belongs to.
        drafting=DraftConfig(window=1, branches=0, alternatives=alternatives, adaptive=False),
        pad_frames=pad,
    )
    cloud_config = CloudConfig(
        folder, input_layers=INPUT_LAYERS, device="cpu", kv_bytes=64 << 20, drain_s=0.1
    )
    traces = []
    async with running_cloud(cloud_config) as cloud:
        generator = await connect(folder, cloud.address, config=config, drafter="auto")
        row_bytes = generator.model.hidden_size * generator.model.dtype.itemsize
        events = watch(generator)
        try:
            for number, prompt in enumerate(prompts):
                if not prompt.chat:
                    continue
                ids = encoder.encode_chat([{"role": "user", "content": prompt.text}])
                for seed in range(args.runs):
                    events.clear()
                    sampling = SamplingParams(TEMPERATURE, seed=seed)
                    request = GenerationRequest(ids, args.max_new_tokens, sampling)
                    tokens = [event.token_id async for event in generator.generate(request)]
                    traces.append(trace(number, list(events), row_bytes, len(tokens)))
        finally:
            await generator.close()
    return traces


def guessed(seen: Sequence[Hashable], truth: Sequence[int]) -> tuple[float, float]:
    """(share guessed right from what is seen, share without looking): the commonest value, over FOLDS folds."""
    right = blind = 0
    for fold in range(FOLDS):
        others = [i for i in range(len(truth)) if i % FOLDS != fold]
        common = Counter(truth[i] for i in others).most_common(1)[0][0]
        table_of: dict[Hashable, Counter[int]] = {}
        for i in others:
            table_of.setdefault(seen[i], Counter())[truth[i]] += 1
        for i in range(fold, len(truth), FOLDS):
            known = table_of.get(seen[i])
            right += (common if known is None else known.most_common(1)[0][0]) == truth[i]
            blind += common == truth[i]
    return right / len(truth), blind / len(truth)


def information(seen: Sequence[Hashable], truth: Sequence[int]) -> float:
    """Mutual information in bits, less what chance gives at this number of rounds (mean over shuffles)."""
    rng = random.Random(0)

    def plain(values: Sequence[int]) -> float:
        n, both = len(values), Counter(zip(seen, values, strict=True))
        left, right = Counter(seen), Counter(values)
        return sum(c / n * math.log2(c * n / (left[a] * right[b])) for (a, b), c in both.items())

    by_chance = [plain(rng.sample(list(truth), len(truth))) for _ in range(SHUFFLES)]
    return max(0.0, plain(truth) - statistics.mean(by_chance))


def recognised(traces: Sequence[Trace]) -> float:
    """Share of answers whose nearest other answer, by the sizes in order, is one to the same prompt."""
    longest = max(len(one.sizes) for one in traces)
    vectors = [one.sizes + [0] * (longest - len(one.sizes)) for one in traces]
    right = 0
    for i, vector in enumerate(vectors):
        distances = [
            (sum(abs(a - b) for a, b in zip(vector, other, strict=True)), j)
            for j, other in enumerate(vectors)
            if j != i
        ]
        right += traces[min(distances)[1]].prompt == traces[i].prompt
    return right / len(traces)


def row(name: str, traces: Sequence[Trace]) -> list[str]:
    """A line of the table."""
    rounds = [one for answer in traces for one in answer.rounds]
    seen = [one.seen for one in rounds]
    drafts, accepted = [one.drafts for one in rounds], [one.accepted for one in rounds]
    (of_drafts, blind_drafts), (of_accepted, blind_accepted) = guessed(seen, drafts), guessed(seen, accepted)
    tokens = sum(one.tokens for one in traces)
    prompts = len({one.prompt for one in traces})
    return [
        name,
        f"{sum(one.up for one in traces) / tokens:,.0f}",
        f"{sum(one.down for one in traces) / tokens:,.0f}",
        f"{100 * of_drafts:.0f} % ({100 * blind_drafts:.0f} %), {information(seen, drafts):.2f} bit",
        f"{100 * of_accepted:.0f} % ({100 * blind_accepted:.0f} %), {information(seen, accepted):.2f} bit",
        f"{100 * recognised(traces):.0f} % ({100 / prompts:.0f} %)",
    ]


ABOUT = f"""\
What sizes of messages tell whoever watches the network of an answer, TLS or not, and what `--pad-frames` costs. Each
prompt of `tests/data/prompts.jsonl` is answered several times at temperature {TEMPERATURE} with the default
drafter, one round in flight and nothing drafted meanwhile, so that it is plain what a round had. The observer knows
direction and size of each message, in order. In brackets: guessing without looking.
*drafts*, *accepted*: how many a round had, guessed from the sizes of its Step, of its Result and of the next Step, and
the mutual information, less what chance gives. *prompt*: which of the prompts it was, by the nearest other answer.

What padding does not hide: how many rounds there are and when (with them, roughly, how much was accepted in all, and
the answer's length), how many units of 64 tokens a prompt has, and that somebody asks at all. A round of every size
costs as much as the largest, so lower `--max-draft` and `--alternatives` where bytes are dear."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=int, default=16, help="prompts (default %(default)s)")
    parser.add_argument("--runs", type=int, default=4, help="answers of each prompt (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of an answer (default %(default)s)")
    parser.add_argument("--short", action="store_true", help="2 prompts, 2 answers each; writes nothing")
    args = parser.parse_args()
    if args.short:
        args.limit, args.runs, args.max_new_tokens = 2, 2, 12
    folder = model_folder(None)
    about, rows = facts(folder), []
    try:
        for name, (pad, alternatives) in SETTINGS.items():
            progress(name)
            rows.append(row(name, asyncio.run(measure(folder, pad, alternatives, args))))
    except HatError as error:
        print(f"padding: {error}", file=sys.stderr)
        return error.exit_code
    columns = (
        "frames",
        "bytes up a token",
        "bytes down a token",
        "drafts of a round",
        "accepted of a round",
        "prompt",
    )
    body = table(columns, rows)
    print(body)
    if not args.short:
        (REPORTS / "padding.md").write_text(report("Fixed-size frames", ABOUT, about, body))
    return 0


if __name__ == "__main__":
    sys.exit(main())
