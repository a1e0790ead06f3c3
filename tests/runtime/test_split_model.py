"""The split model computes what the whole model computes, for any packing of its passes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hat_runtime.errors import ModelError
from hat_runtime.model.attention import make_backend
from hat_runtime.model.hf import DeviceEnds, load_decoder_slice, load_device_ends
from hat_runtime.model.pages import PagedSequence
from hat_runtime.model.runner import LayerRunner, Segment, make_cache
from hat_runtime.model.split import LayerRange
from tests.tiny_models import ARCHITECTURES

INPUT_LAYERS, LAYERS = 2, 6


def load_split(folder: Path, page_tokens: int = 4) -> tuple[DeviceEnds, LayerRunner, LayerRunner]:
    ends = load_device_ends(folder, torch.float32)
    runners = []
    for layers in (LayerRange(0, INPUT_LAYERS), LayerRange(INPUT_LAYERS, LAYERS)):
        part = load_decoder_slice(folder, layers, torch.float32)
        cache = make_cache(part, num_pages=600 // page_tokens, page_tokens=page_tokens)
        runners.append(LayerRunner(part, cache, make_backend("sdpa")))
    return ends, *runners


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_packed_passes_with_truncations_equal_the_whole_model(
    architecture: str, tiny_models: dict[str, Path]
) -> None:
    """Three sequences advance in random pieces, packed together, with random rollbacks."""
    folder = tiny_models[architecture]
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ends, shallow, middle = load_split(folder)
    rng = random.Random(architecture)
    texts = [torch.randint(3, 199, (length,)) for length in (61, 90, 17)]
    pairs = [(PagedSequence(), PagedSequence()) for _ in texts]
    deep = [torch.full((len(text), 64), float("nan")) for text in texts]

    while any(pair[1].length < len(text) for pair, text in zip(pairs, texts, strict=True)):
        chosen = [i for i, text in enumerate(texts) if pairs[i][1].length < len(text) and rng.random() < 0.8]
        if not chosen:
            continue
        starts = [max(0, pairs[i][1].length - rng.choice([0, 0, 0, 1, 5])) for i in chosen]
        ends_at = [
            min(len(texts[i]), s + rng.choice([1, 2, 7, 33])) for i, s in zip(chosen, starts, strict=True)
        ]
        embedded = [ends.embed(texts[i][s:e]) for i, s, e in zip(chosen, starts, ends_at, strict=True)]
        states = shallow.run(
            [Segment(pairs[i][0], s, h) for i, s, h in zip(chosen, starts, embedded, strict=True)]
        )
        outs = middle.run(
            [Segment(pairs[i][1], s, h) for i, s, h in zip(chosen, starts, states, strict=True)]
        )
        for i, s, e, out in zip(chosen, starts, ends_at, outs, strict=True):
            deep[i][s:e] = out

    for text, states in zip(texts, deep, strict=True):
        expected = whole(text[None]).logits[0]
        torch.testing.assert_close(ends.head(states), expected, atol=2e-4, rtol=1e-4)
        assert torch.equal(ends.head(states).argmax(-1), expected.argmax(-1))
    for runner, side in ((shallow, 0), (middle, 1)):
        for pair in pairs:
            runner.cache.release(pair[side])
        runner.cache.check([])
        assert not runner.cache.keys.any(), "freed pages are zeroed"
        assert not runner.cache.values.any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_an_alternative_is_computed_as_if_it_stood_there_and_leaves_nothing_behind(
    architecture: str, tiny_models: dict[str, Path]
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(tiny_models[architecture], dtype=torch.float32).eval()
    ends, shallow, middle = load_split(tiny_models[architecture])
    text, others, at = torch.randint(3, 199, (50,)), torch.randint(3, 199, (3,)), (41, 43, 43)
    pair, other = (PagedSequence(), PagedSequence()), (PagedSequence(), PagedSequence())

    def run(
        pair: tuple[PagedSequence, PagedSequence], ids: torch.Tensor, aside: tuple[int, ...] = ()
    ) -> torch.Tensor:
        start = pair[0].length
        hidden = shallow.run([Segment(pair[0], start, ends.embed(ids), aside=aside)])[0]
        assert pair[0].length == start + len(ids) - len(aside)
        # Not alone in the pass, so that both ways to read the cache are seen.
        deep = middle.run(
            [Segment(pair[1], start, hidden, aside=aside), Segment(other[1], other[1].length, hidden[:2])]
        )[0]
        return ends.head(deep)

    run(pair, text[:40])
    said = run(pair, torch.cat([text[40:45], others]), at)
    expected = whole(text[None]).logits[0]
    torch.testing.assert_close(said[:5], expected[40:45], atol=2e-4, rtol=1e-4)
    for row, (token, position) in enumerate(zip(others, at, strict=True), start=5):
        instead = whole(torch.cat([text[:position], token[None]])[None]).logits[0, -1]
        torch.testing.assert_close(said[row], instead, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(run(pair, text[45:]), expected[45:], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_side_holds_exactly_its_parameters(architecture: str, tiny_models: dict[str, Path]) -> None:
    folder = tiny_models[architecture]
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    by_side: dict[bool, set[str]] = {True: set(), False: set()}
    for name, _ in whole.named_parameters():
        if name.startswith("model.layers."):
            by_side[int(name.split(".")[2]) < INPUT_LAYERS].add(name)
    device = load_decoder_slice(folder, LayerRange(0, INPUT_LAYERS), torch.float32)
    cloud = load_decoder_slice(folder, LayerRange(INPUT_LAYERS, LAYERS), torch.float32)
    assert device.parameter_names == by_side[True]
    assert cloud.parameter_names == by_side[False]


def test_tied_head_is_the_embedding_itself(tiny_llama: Path) -> None:
    ends = load_device_ends(tiny_llama, torch.float32)
    assert ends._head.data_ptr() == ends._embedding.weight.data_ptr()


def test_reads_only_the_shards_it_needs(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """The other shards may be absent: a part's folder does not hold them."""
    import json
    import shutil

    folder = shutil.copytree(tiny_models["qwen3"], tmp_path / "part")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {
        shard for name, shard in weight_map.items() if name.startswith(("model.layers.4.", "model.layers.5."))
    }
    unneeded = set(weight_map.values()) - needed
    assert unneeded
    for shard in unneeded:
        (folder / shard).unlink()
    assert len(load_decoder_slice(folder, LayerRange(4, 6), torch.float32).parameter_names) > 0
    with pytest.raises(ModelError):
        load_decoder_slice(folder, LayerRange(0, 2), torch.float32)


def test_unsupported_architecture_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'gpt2' is not supported; supported are llama"):
        load_decoder_slice(tmp_path, LayerRange(0, 1), torch.float32)
