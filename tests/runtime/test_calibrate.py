"""The calibration must time the real computation: its parts, put together, are the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from hat_runtime.errors import ModelError, UsageError
from hat_runtime.model.calibrate import BareModel, calibrate, prompt_times
from tests.tiny_models import make_tiny_model


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_the_parts_are_the_model(tiny_llama: Path, chunk: int) -> None:
    bare = BareModel(tiny_llama, torch.float32)
    ids = torch.arange(3, 43)
    cache = DynamicCache()
    deep = []
    for start in range(0, 40, chunk):
        end = min(start + chunk, 40)
        positions = torch.arange(start, end)[None]
        shallow = bare.layers(bare.embed(ids[start:end]), 0, 2, cache, start, positions)
        deep.append(bare.layers(shallow, 2, bare.num_layers, cache, start, positions))
    logits = bare.head(torch.cat(deep, dim=1))
    torch.testing.assert_close(logits, bare.model(ids[None]).logits, atol=1e-4, rtol=1e-4)


def test_every_part_is_measured(tiny_llama: Path) -> None:
    parts = calibrate(tiny_llama, 2, "bfloat16", prompt_tokens=140, context_tokens=30, repeats=3)
    assert min(parts.t_in, parts.t_head, parts.t_cloud, parts.beta, parts.s) > 0
    assert parts.beta < parts.t_cloud  # a token in a prompt costs less than a token alone
    assert parts.hidden_bytes == 64 * 2
    assert (parts.prompt_tokens, parts.context_tokens, parts.num_layers) == (140, 30, 6)


def test_what_cannot_be_calibrated_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--input-layers 6"):
        calibrate(tiny_llama, 6)
    with pytest.raises(ModelError, match="more than one type"):
        calibrate(make_tiny_model("gemma3_text", tmp_path), 2)


def test_whole_prompts_take_longer_the_longer_they_are(tiny_llama: Path) -> None:
    times = prompt_times(tiny_llama, 2, (8, 900), "float32")
    assert list(times) == [8, 900]
    assert all(long > short > 0 for short, long in zip(times[8], times[900], strict=True))
