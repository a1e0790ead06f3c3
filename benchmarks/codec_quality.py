"""What the uplink's codecs cost: bytes, time, and how far they move the model.

    python benchmarks/codec_quality.py              several minutes; writes docs/benchmarks/codec_quality.md
    python benchmarks/codec_quality.py --short      two prompts, to see that it works; writes nothing
    python benchmarks/codec_quality.py --variants   also other group sizes and numbers of outliers

Prompts of Spec-Bench and CNN/DailyMail from $HAT_DATA are answered greedily with raw states. Then the same tokens go
through each codec once more: the next-token distribution at every token of the answer is compared with raw's. A greedy
answer through the codec equals raw's exactly if all its likeliest tokens are raw's, so that nothing is generated twice.
Everything runs in this process, on the layers that device and cloud run, without servers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import REPORTS, data_prompts, facts, model_folder, progress, report, table

from hat_runtime.data import Prompt
from hat_runtime.device.chat import PromptEncoder
from hat_runtime.errors import HatError, UsageError
from hat_runtime.model.attention import make_backend
from hat_runtime.model.hf import (
    eos_token_ids,
    load_decoder_slice,
    load_device_ends,
    load_tokenizer,
    num_layers,
)
from hat_runtime.model.pages import PagedSequence
from hat_runtime.model.runner import LayerRunner, Segment, make_cache
from hat_runtime.model.split import LayerRange
from hat_runtime.wire.codec import CODECS, RAW, RowCodec, codec_named, dtype_name
from hat_runtime.wire.int4 import Int4
from hat_runtime.wire.int8 import Int8
from hat_runtime.wire.outliers import Outliers

DTYPE = torch.float32
PAGES, PAGE_TOKENS = 1024, 16
CHUNK = 512
MOST_PROMPT_TOKENS = 1500
VARIANTS: dict[str, RowCodec] = {
    "int8, no outliers": Int8(Outliers(0)),
    "int8, 4 outliers": Int8(Outliers(4)),
    "int8, 16 outliers": Int8(Outliers(16)),
    "int8, 32 outliers": Int8(Outliers(32)),
    "int4, no outliers": Int4(outliers=Outliers(0)),
    "int4, groups of 32": Int4(group=32),
    "int4, groups of 128": Int4(group=128),
    "int4, groups of 32, 16 outliers": Int4(group=32, outliers=Outliers(16)),
}


@dataclass
class Answered:
    """A prompt and its greedy answer with raw states."""

    prompt: list[int]
    shallow: torch.Tensor
    """[prompt and all of the answer but its last token, hidden_size]"""
    answer: list[int]
    log_p: torch.Tensor
    """Raw's log-probabilities [len(answer), vocabulary] of the tokens of the answer."""


@dataclass
class Quality:
    """One codec and where it is used, over all answers."""

    kl: list[float] = field(default_factory=list)
    """In nats, one for each token of an answer: KL(raw || codec)."""
    same: list[bool] = field(default_factory=list)
    """Is the likeliest token raw's?"""
    equal: list[bool] = field(default_factory=list)
    """Is the whole answer raw's? One for each prompt."""

    def note(self, answered: Answered, log_q: torch.Tensor) -> None:
        """Add an answer's distributions under the codec."""
        log_p = answered.log_p
        self.kl += (log_p.exp() * (log_p - log_q)).sum(dim=1).tolist()
        same = log_q.argmax(dim=1) == log_p.argmax(dim=1)
        self.same += same.tolist()
        self.equal.append(log_q.argmax(dim=1).tolist() == answered.answer)


class Split:
    """Both sides of the model in this process."""

    def __init__(self, folder: Path, input_layers: int) -> None:
        self.ends = load_device_ends(folder, DTYPE)
        self.stop_ids = eos_token_ids(folder)
        self.hidden_size = 0
        self._runners: list[LayerRunner] = []
        for span in (LayerRange(0, input_layers), LayerRange(input_layers, num_layers(folder))):
            part = load_decoder_slice(folder, span, DTYPE)
            self.hidden_size = part.hidden_size
            cache = make_cache(part, num_pages=PAGES, page_tokens=PAGE_TOKENS)
            self._runners.append(LayerRunner(part, cache, make_backend("sdpa")))

    def shallow(self, sequence: PagedSequence, start: int, ids: list[int]) -> torch.Tensor:
        """Shallow states [len(ids), hidden_size]."""
        return self._run(0, sequence, start, self.ends.embed(torch.tensor(ids)))

    def deep(self, sequence: PagedSequence, start: int, hidden: torch.Tensor) -> torch.Tensor:
        """Deep states [len(hidden), hidden_size]; truncates the cloud's cache to `start` first."""
        return self._run(1, sequence, start, hidden)

    def release(self, side: int, sequence: PagedSequence) -> None:
        """Give a sequence's pages back: 0 the device's, 1 the cloud's."""
        self._runners[side].cache.release(sequence)

    def _run(self, side: int, sequence: PagedSequence, start: int, hidden: torch.Tensor) -> torch.Tensor:
        runner = self._runners[side]
        parts = [
            runner.run([Segment(sequence, start + first, hidden[first : first + CHUNK])])[0]
            for first in range(0, len(hidden), CHUNK)
        ]
        return torch.cat(parts)

    def answer(self, prompt: list[int], new_tokens: int) -> Answered:
        """Answer greedily with raw states; distributions from one pass over the answer, as the codecs get it."""
        device, cloud = PagedSequence(), PagedSequence()
        shallow = [self.shallow(device, 0, prompt)]
        deep = self.deep(cloud, 0, shallow[0])[-1:]
        answer: list[int] = []
        while True:
            answer.append(int(self.ends.head(deep).argmax()))
            if len(answer) == new_tokens or answer[-1] in self.stop_ids:
                break
            position = len(prompt) + len(answer) - 1
            shallow.append(self.shallow(device, position, answer[-1:]))
            deep = self.deep(cloud, position, shallow[-1])
        answered = Answered(prompt, torch.cat(shallow), answer, torch.empty(0))
        answered.log_p = self.distributions(answered, cloud, answered.shallow)
        self.release(0, device)
        self.release(1, cloud)
        return answered

    def distributions(
        self, answered: Answered, cloud: PagedSequence, shallow: torch.Tensor, cached: int = 0
    ) -> torch.Tensor:
        """Log-probabilities [len(answer), vocabulary] where the cloud gets these shallow states from `cached` on."""
        deep = self.deep(cloud, cached, shallow[cached:])
        return self.ends.head(deep[-len(answered.answer) :]).log_softmax(dim=1)


def through(codec: RowCodec, hidden: torch.Tensor) -> torch.Tensor:
    """What arrives of hidden states."""
    return codec.decode(codec.encode(hidden), len(hidden), hidden.shape[1], hidden.dtype)


def compare(split: Split, answered: Answered, codec: RowCodec) -> Iterator[torch.Tensor]:
    """Log-probabilities of the answer's tokens: the prompt through the codec, then all rows through it."""
    cloud = PagedSequence()
    n = len(answered.prompt)
    coded = through(codec, answered.shallow)
    yield split.distributions(answered, cloud, torch.cat([coded[:n], answered.shallow[n:]]))
    # The prompt's rows are in the cache but the last one, whose deep state is needed again.
    yield split.distributions(answered, cloud, coded, cached=n - 1)
    split.release(1, cloud)


def relative_error(codec: RowCodec, answers: list[Answered]) -> tuple[float, float]:
    """|x - x'| / |x| of the rows of all prompts: mean and largest."""
    errors = []
    for answered in answers:
        rows = answered.shallow[: len(answered.prompt)]
        errors += ((through(codec, rows) - rows).norm(dim=1) / rows.norm(dim=1)).tolist()
    return statistics.fmean(errors), max(errors)


def micros(codec: RowCodec, hidden: torch.Tensor, repeats: int = 50) -> float:
    """Encode and decode together, in microseconds; median."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        through(codec, hidden)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


@torch.inference_mode()
def main() -> int:
    args = _arguments()
    torch.set_num_threads(1)
    folder = model_folder(args.model)
    prompts = _prompts(folder, args)
    split = Split(folder, args.input_layers)
    codecs = {name: codec_named(name) for name in CODECS} | (VARIANTS if args.variants else {})
    qualities = {(name, where): Quality() for name in codecs for where in ("prompt", "all")}
    answers = []
    for number, prompt in enumerate(prompts, 1):
        progress(f"prompt {number} of {len(prompts)}: {len(prompt)} tokens")
        answered = split.answer(prompt, args.new_tokens)
        for name, codec in codecs.items():
            for where, log_q in zip(("prompt", "all"), compare(split, answered, codec), strict=True):
                qualities[name, where].note(answered, log_q)
        answered.log_p = torch.empty(0)
        answers.append(answered)
    page = _page(args, folder, split, codecs, qualities, answers)
    print(page)
    if args.out:
        args.out.write_text(page, encoding="utf-8")
    return 0


def _prompts(folder: Path, args: argparse.Namespace) -> list[list[int]]:
    encoder = PromptEncoder(load_tokenizer(folder))

    def spread_out(prompts: list[Prompt], count: int) -> list[Prompt]:
        return [prompts[index * len(prompts) // count] for index in range(count)]

    chosen = spread_out(data_prompts("spec_bench.jsonl"), args.spec_bench)
    chosen += spread_out(data_prompts("cnn_dm.jsonl"), args.cnn_dm)
    encoded = [
        encoder.encode_chat([{"role": "user", "content": prompt.text}])
        if prompt.chat
        else encoder.encode_text(prompt.text)
        for prompt in chosen
    ]
    return [ids for ids in encoded if len(ids) <= MOST_PROMPT_TOKENS]


def _page(
    args: argparse.Namespace,
    folder: Path,
    split: Split,
    codecs: dict[str, RowCodec],
    qualities: dict[tuple[str, str], Quality],
    answers: list[Answered],
) -> str:
    many = torch.cat([answered.shallow for answered in answers])[:128]
    sizes = []
    for name, codec in codecs.items():
        mean, most = relative_error(codec, answers)
        size = codec.row_bytes(split.hidden_size, DTYPE)
        sizes.append(
            [name, size, f"{split.hidden_size * DTYPE.itemsize / size:.2f} x", f"{mean:.2%}", f"{most:.2%}"]
            + [f"{micros(codec, rows):.0f}" for rows in (many[:1], many)]
        )
    distances = []
    for (name, where), quality in qualities.items():
        if name == RAW and where == "all":
            continue
        worst = statistics.quantiles(quality.kl, n=100, method="inclusive")[-1]
        distances.append(
            [
                name,
                {"prompt": "prompt", "all": "prompt and decode"}[where],
                f"{statistics.fmean(quality.kl):.1e}",
                f"{worst:.1e}",
                f"{statistics.fmean(quality.same):.2%}",
                f"{sum(quality.equal)} of {len(quality.equal)}",
            ]
        )
    tokens = sum(len(answered.answer) for answered in answers)
    lengths = [len(answered.prompt) for answered in answers]
    about = facts(folder, ("torch", "transformers", "numpy"))
    about["split"] = (
        f"{args.input_layers} layers on the device, {dtype_name(DTYPE)} compute, states of {split.hidden_size}"
    )
    about["prompts"] = (
        f"{len(answers)} of spec_bench.jsonl ({args.spec_bench}) and cnn_dm.jsonl ({args.cnn_dm}), "
        f"{min(lengths)} to {max(lengths)} tokens, at most {MOST_PROMPT_TOKENS}; "
        f"greedy answers of up to {args.new_tokens} tokens, {tokens} in all"
    )
    body = (
        "## Rows\nEncode and decode together, one thread. Error: |x - x'| / |x| of a prompt's row.\n\n"
        + table(
            ("codec", "bytes a token", "smaller", "mean error", "largest", "1 row, µs", "128 rows, µs"), sizes
        )
        + "\n\n## The model\nAgainst raw at every token of raw's greedy answers; KL in nats. The row of raw is the "
        "control: one pass over an answer finds the tokens that were generated one by one.\n\n"
        + table(
            ("codec", "of", "KL, mean", "KL, p99", "same likeliest token", "equal greedy answers"), distances
        )
    )
    text = (
        "What the codecs of the uplink cost on the default model. Where only the prompt is encoded, the answer's rows\n"
        "travel raw."
    )
    return report("Codecs of the uplink", text, about, body)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spec-bench", type=int, default=40, metavar="N", help="prompts of spec_bench.jsonl")
    parser.add_argument("--cnn-dm", type=int, default=8, metavar="N", help="prompts of cnn_dm.jsonl")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--input-layers", type=int, default=3, metavar="M")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: the default model")
    parser.add_argument("--variants", action="store_true", help="codecs that were tried and not chosen, too")
    parser.add_argument("--short", action="store_true", help="two prompts of 16 new tokens, no report")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.md", help="default docs/benchmarks/codec_quality.md"
    )
    args = parser.parse_args()
    for option, least in (("spec_bench", 1), ("cnn_dm", 1), ("new_tokens", 1)):
        if getattr(args, option) < least:
            raise UsageError(f"--{option.replace('_', '-')} {getattr(args, option)}: must be {least} or more")
    if args.short:
        args.spec_bench, args.cnn_dm, args.new_tokens = 1, 1, 16
    elif args.out is None:
        args.out = REPORTS / "codec_quality.md"
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HatError as error:
        sys.exit(f"codec_quality: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
