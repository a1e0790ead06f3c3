"""Times bare transformers layers, for the limits that our engine and servers are held against.

The model is loaded with plain `AutoModelForCausalLM.from_pretrained`, and its layers are called one after the other
with transformers' own `DynamicCache` and attention. Nothing of our loader, cache, engine or servers runs here: their
slowness must not make a limit look better. `python -m hat_runtime.model.calibrate FOLDER` prints the result as JSON, so
that a process that must stay small or unpinned can have it measured elsewhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from hat_runtime.errors import ModelError
from hat_runtime.model.drafter import load_drafter, rotate, rotation
from hat_runtime.model.split import cloud_layers, device_layers
from hat_runtime.wire.codec import DTYPES, row_bytes

CHUNKS = (128, 256, 512)
"""Chunk sizes tried for beta and s, beside the whole prompt."""


@dataclass(frozen=True)
class ComputeParts:
    """Times of the three submodels, in seconds, by themselves on this machine."""

    t_in: float
    """Embedding and input layers, one token."""
    t_head: float
    """Final norm, LM head and argmax, one token."""
    t_cloud: float
    """Middle layers, one token."""
    beta: float
    """Middle layers, a token of the prompt; whole or in chunks, whichever is faster."""
    s: float
    """Embedding and input layers, a token of the prompt; whole or in chunks, whichever is faster."""
    t_draft: float
    """Input layers, drafter and its head, one token; 0 where no drafter was named."""
    hidden_bytes: int
    """One hidden state on the wire."""
    prompt_tokens: int
    """Prompt length of `beta` and `s`."""
    context_tokens: int
    """Tokens in the cache when `t_in` and `t_cloud` were measured."""
    input_layers: int
    num_layers: int
    dtype: str
    threads: int


class BareModel:
    """A whole model whose parts can be called by themselves. One sequence; hidden states are [1, T, hidden_size]."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        """Load the model in `folder` on the CPU.

        Raises:
            ModelError: its layers differ in their attention; they would need more than one mask.
        """
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()
        self.config = self.model.config
        if len(set(getattr(self.config, "layer_types", None) or ["full_attention"])) > 1:
            raise ModelError(
                f"{folder}: layers of more than one type; calibration knows models of one layer type only"
            )
        self.num_layers: int = self.config.num_hidden_layers

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [T] -> embeddings."""
        embeddings: torch.Tensor = self.model.model.embed_tokens(ids[None])
        return embeddings

    def layers(
        self, hidden: torch.Tensor, lo: int, hi: int, cache: DynamicCache, start: int, positions: torch.Tensor
    ) -> torch.Tensor:
        """Decoder layers lo <= i < hi over rows at positions start, start + 1, ...

        Args:
            hidden: rows [1, T, hidden_size].
            lo: first layer.
            hi: layer after the last.
            cache: grows by the T rows in these layers.
            start: rows already in these layers' cache.
            positions: [1, T], start and the following.
        """
        rotary = self.model.model.rotary_emb(hidden, position_ids=positions)
        mask = None  # one token sees everything; a prompt from position 0 is what is_causal means
        if start > 0 and hidden.shape[1] > 1:
            mask = (torch.arange(start + hidden.shape[1])[None] <= positions[0][:, None])[None, None]
        for layer in self.model.model.layers[lo:hi]:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rotary,
            )
        return hidden

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and LM head: logits [1, T, vocabulary]."""
        logits: torch.Tensor = self.model.lm_head(self.model.model.norm(hidden))
        return logits


class _Split:
    """Input and middle layers of a bare model over a random text of some length."""

    def __init__(self, bare: BareModel, input_layers: int, length: int) -> None:
        self._bare = bare
        self._low = device_layers(input_layers, bare.num_layers)
        self._high = cloud_layers(input_layers, bare.num_layers)
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(bare.config.vocab_size, (length,), generator=generator)
        self._positions = torch.arange(length)[None]
        self._rows = self.shallow(0, length, DynamicCache())

    def shallow(self, start: int, end: int, cache: DynamicCache) -> torch.Tensor:
        """Embedding and input layers over the text's tokens start <= i < end."""
        embedded, positions = self._bare.embed(self._ids[start:end]), self._positions[:, start:end]
        return self._bare.layers(embedded, self._low.lo, self._low.hi, cache, start, positions)

    def middle(self, start: int, end: int, cache: DynamicCache) -> torch.Tensor:
        """Middle layers over the same rows."""
        rows, positions = self._rows[:, start:end], self._positions[:, start:end]
        return self._bare.layers(rows, self._high.lo, self._high.hi, cache, start, positions)


@torch.inference_mode()
def calibrate(
    folder: Path,
    input_layers: int,
    dtype: str = "bfloat16",
    prompt_tokens: int = 1000,
    context_tokens: int | None = None,
    repeats: int = 30,
    prompt_repeats: int = 3,
    drafter: Path | None = None,
) -> ComputeParts:
    """Measure the parts of a limit; each is the fastest of its repeats.

    Args:
        folder: a whole model that transformers loads.
        input_layers: layers on the device.
        dtype: "float32" or "bfloat16".
        prompt_tokens: S, the prompt of the first-token limit.
        context_tokens: tokens before the one that is timed; default `prompt_tokens`.
        repeats: of one token.
        prompt_repeats: of the prompt, for each chunk size.
        drafter: a file of `hat train-drafter`.
    """
    bare = BareModel(folder, DTYPES[dtype])
    context = prompt_tokens if context_tokens is None else context_tokens
    split = _Split(bare, input_layers, max(prompt_tokens, context) + repeats + 2)
    shallow, middle = split.shallow, split.middle
    deep = middle(0, 1, DynamicCache())
    t_in = _one_token(shallow, context, repeats)
    return ComputeParts(
        t_in=t_in,
        t_draft=0.0 if drafter is None else t_in + _one_draft(drafter, bare, context, repeats),
        t_head=_best(lambda: int(bare.head(deep).argmax()), repeats),
        t_cloud=_one_token(middle, context, repeats),
        beta=_per_token(middle, prompt_tokens, prompt_repeats),
        s=_per_token(shallow, prompt_tokens, prompt_repeats),
        hidden_bytes=row_bytes(bare.config.hidden_size, DTYPES[dtype]),
        prompt_tokens=prompt_tokens,
        context_tokens=context,
        input_layers=input_layers,
        num_layers=bare.num_layers,
        dtype=dtype,
        threads=torch.get_num_threads(),
    )


@torch.inference_mode()
def prompt_times(
    folder: Path, input_layers: int, lengths: Sequence[int], dtype: str = "bfloat16", repeats: int = 3
) -> dict[int, tuple[float, float]]:
    """Seconds that (input layers, middle layers) need for a whole prompt of each length, in the fastest way.

    The fastest of whole and of chunks of each of CHUNKS, and of the repeats.

    Args:
        folder: a whole model that transformers loads.
        input_layers: layers on the device.
        lengths: prompts' lengths in tokens.
        dtype: "float32" or "bfloat16".
        repeats: of each length and chunk size.
    """
    split = _Split(BareModel(folder, DTYPES[dtype]), input_layers, max(lengths))
    return {
        length: (
            _per_token(split.shallow, length, repeats) * length,
            _per_token(split.middle, length, repeats) * length,
        )
        for length in lengths
    }


@torch.inference_mode()
def whole_passes(
    folder: Path, tokens: Sequence[int], dtype: str = "bfloat16", context_tokens: int = 200, repeats: int = 20
) -> dict[int, float]:
    """Seconds of a pass of the whole model (embedding, layers, norm, head, argmax), the fastest of its repeats.

    Args:
        folder: a whole model.
        tokens: how many tokens a pass has; one measurement for each.
        dtype: "float32" or "bfloat16".
        context_tokens: tokens in the cache before the first pass.
        repeats: passes timed.
    """
    bare = BareModel(folder, DTYPES[dtype])
    most = max(tokens) * (repeats + 1) + context_tokens
    ids = torch.randint(bare.config.vocab_size, (most,), generator=torch.Generator().manual_seed(0))
    everywhere = torch.arange(most)[None]

    def run(start: int, end: int, cache: DynamicCache) -> None:
        hidden = bare.embed(ids[start:end])
        bare.head(bare.layers(hidden, 0, bare.num_layers, cache, start, everywhere[:, start:end])).argmax(-1)

    seconds = {}
    for count in tokens:
        cache = DynamicCache()
        run(0, context_tokens, cache)
        starts = iter(range(context_tokens, most, count))

        def step(count: int = count, cache: DynamicCache = cache, starts: Iterator[int] = starts) -> None:
            start = next(starts)
            run(start, start + count, cache)

        step()
        seconds[count] = _best(step, repeats)
    return seconds


_Pass = Callable[[int, int, DynamicCache], torch.Tensor]
"""(start, end, cache) -> hidden states of the rows start <= i < end."""


def _one_token(run: _Pass, context: int, repeats: int) -> float:
    """Seconds of one token after `context` others; the context grows by one token a repeat."""
    cache = DynamicCache()
    if context:
        run(0, context, cache)
    position = iter(range(context, context + repeats + 2))

    def step() -> None:
        at = next(position)
        run(at, at + 1, cache)

    step()
    return _best(step, repeats)


def _one_draft(path: Path, bare: BareModel, context: int, repeats: int) -> float:
    """Seconds of one guess by a trained drafter after `context` tokens: plain torch, no cache of ours."""
    net, ids = load_drafter(path, bare.model.dtype, torch.device("cpu"))
    shape, head = net.shape, bare.model.lm_head.weight[ids]
    row = torch.randn(1, shape.hidden_size, dtype=bare.model.dtype)
    past = torch.randn(2, 1, shape.kv_heads, context, shape.head_dim, dtype=bare.model.dtype)
    turn = rotation(torch.tensor([context]), shape)

    def draft() -> None:
        rows = net.rows(row, row)
        heads = net.project(rows)
        turned = rotate(heads[:, : shape.heads + shape.kv_heads], turn).transpose(0, 1)[None]
        key = torch.cat([past[0], turned[:, shape.heads :]], 2)
        value = torch.cat([past[1], heads[:, shape.heads + shape.kv_heads :].transpose(0, 1)[None]], 2)
        attended = torch.nn.functional.scaled_dot_product_attention(
            turned[:, : shape.heads], key, value, enable_gqa=True
        )
        guess = net.finish(rows, attended.transpose(1, 2).reshape(1, -1))
        torch.nn.functional.linear(guess, head).argmax()

    draft()
    return _best(draft, repeats)


def _per_token(run: _Pass, tokens: int, repeats: int) -> float:
    """Seconds a token of a prompt, by its best chunk size."""

    def prompt(chunk: int) -> None:
        cache = DynamicCache()
        for start in range(0, tokens, chunk):
            run(start, min(start + chunk, tokens), cache)

    sizes = {tokens, *(chunk for chunk in CHUNKS if chunk < tokens)}
    prompt(tokens)
    return min(_best(lambda chunk=size: prompt(chunk), repeats) for size in sizes) / tokens  # type: ignore[misc]


def _best(work: Callable[[], object], repeats: int) -> float:
    """The fastest of several: a limit is what the machine can do, and whatever else it does only adds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main(argv: list[str] | None = None) -> None:
    """Print a ComputeParts, or the times of prompts or of whole passes, as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--input-layers", type=int, help="for the parts of a split model")
    parser.add_argument("--passes", metavar="N,N", help="instead: the whole model, passes of so many tokens")
    parser.add_argument("--prompts", metavar="N,N", help="instead: whole prompts of so many tokens")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--context-tokens", type=int)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--drafter", type=Path)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.passes:
        counts = [int(count) for count in args.passes.split(",")]
        print(json.dumps(whole_passes(args.folder, counts, args.dtype, args.prompt_tokens)))
        return
    if args.input_layers is None:
        parser.error("--input-layers or --passes is needed")
    if args.prompts:
        counts = [int(count) for count in args.prompts.split(",")]
        print(json.dumps(prompt_times(args.folder, args.input_layers, counts, args.dtype)))
        return
    parts = calibrate(
        args.folder,
        args.input_layers,
        args.dtype,
        args.prompt_tokens,
        args.context_tokens,
        args.repeats,
        drafter=args.drafter,
    )
    print(json.dumps(dataclasses.asdict(parts)))


if __name__ == "__main__":
    main()
