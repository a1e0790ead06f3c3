"""The API with the default model: what a newcomer sees first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hat_runtime.cloud.serve import CloudConfig, running_cloud
from hat_runtime.model.prepare import prepare
from tests.runtime.api_pair import MODEL, Pair, device_for

pytestmark = [pytest.mark.default_model, pytest.mark.asyncio(loop_scope="module")]

QUESTION = "What is the capital of France?"
EMOJI = "Repeat exactly: 🙂🎉 naïve 漢字"


def greedy(question: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 32} | fields


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair() -> AsyncIterator[Pair]:
    folder = await asyncio.to_thread(prepare, "default")
    config = CloudConfig(model=folder, input_layers=3, dtype="float32", drain_s=0.2)
    async with running_cloud(config) as cloud, device_for(cloud, folder) as running:
        yield running
        await running.all_free()


@pytest.mark.parametrize("question", [QUESTION, EMOJI])
async def test_it_answers_as_the_whole_model(pair: Pair, question: str) -> None:
    folder = await asyncio.to_thread(prepare, "default")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**inputs, do_sample=False, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
    want = tokenizer.decode(out, skip_special_tokens=True).rstrip("\ufffd")
    reply = await pair.openai.chat.completions.create(**greedy(question))
    assert reply.choices[0].message.content == want
    stream = await pair.openai.chat.completions.create(**greedy(question, stream=True))
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == want
    assert "\ufffd" not in want


async def test_paris_and_the_end_of_the_turn(pair: Pair) -> None:
    reply = await pair.openai.chat.completions.create(**greedy(QUESTION))
    assert "Paris" in (reply.choices[0].message.content or "")
    assert reply.choices[0].finish_reason == "stop"
    assert "<|im_end|>" not in (reply.choices[0].message.content or "")


async def test_stop_strings_and_the_next_turn(pair: Pair) -> None:
    cut = await pair.openai.chat.completions.create(**greedy(QUESTION, stop="Paris"))
    assert "Paris" not in (cut.choices[0].message.content or "")
    assert (cut.choices[0].message.content or "").strip()
    first = await pair.openai.chat.completions.create(**greedy(QUESTION))
    history = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And of Italy?"},
    ]
    second = await pair.openai.chat.completions.create(**(greedy("") | {"messages": history}))
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= first.usage.prompt_tokens
