"""The extension `hat_token_kinds`: every token's kind, in both modes, adds up to the text and to the counters."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from hat_runtime.cloud.serve import running_cloud
from hat_runtime.device.generator import GeneratorConfig
from hat_runtime.device.policy import DraftConfig
from hat_runtime.device.token_answer import SpeculationConfig
from tests.runtime.api_pair import MODEL, Pair, cloud_config, device_for
from tests.runtime.picospec_pair import perturbed
from tests.tiny_chat import make_tiny_chat_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPTS = ["The quick brown fox", "Zwei Köche 漢字 🙂", "one two three four"]
NEW = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def draft(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return perturbed(folder, tmp_path_factory.mktemp("chat") / "draft", 0.01)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["hat", "picospec", "picospec alone"])
async def pair(request: pytest.FixtureRequest, folder: Path, draft: Path) -> AsyncIterator[Pair]:
    """In "picospec alone" the cloud decodes by itself all the time while the device drafts as well."""
    if request.param == "hat":
        cloud, device = {}, {
            "drafter": f"model:{draft}",
            "generator": GeneratorConfig(drafting=DraftConfig(alternatives=2, adaptive=False)),
        }  # fmt: skip
    else:
        ahead = 1 if request.param == "picospec" else None
        cloud, device = {"mode": "picospec", "input_layers": None}, {
            "mode": "picospec",
            "draft_model": draft,
            "speculation": SpeculationConfig(ahead=ahead, adaptive=False),
        }  # fmt: skip
    async with (
        running_cloud(cloud_config(folder, **cloud)) as running,
        device_for(running, folder, **device) as pair,
    ):
        yield pair
        await pair.all_free()


async def streamed(
    pair: Pair, path: str = "/v1/completions", **fields: Any
) -> tuple[str, list[Any], Any, str]:
    """Text, tokens, the usage's extension with completion_tokens, and finish reason."""
    body = {"model": MODEL, "max_tokens": NEW, "temperature": 0, "hat_token_kinds": True, "stream": True}
    body |= {"stream_options": {"include_usage": True}} | fields
    reply = await pair.http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    text, tokens, usage, reason = "", [], {}, ""
    for event in reply.text.split("\n\n"):
        if not event.startswith("data: {"):
            continue
        chunk = json.loads(event.removeprefix("data: "))
        if not chunk["choices"]:
            usage = chunk["usage"]
            continue
        choice = chunk["choices"][0]
        piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
        told = choice.get("hat", {}).get("tokens", [])
        assert "".join(token["text"] for token in told) == piece  # in every single chunk
        text, tokens, reason = text + piece, tokens + told, choice["finish_reason"] or reason
    return text, tokens, usage["hat"] | {"completion_tokens": usage["completion_tokens"]}, reason


def check_counts(tokens: list[Any], usage: dict[str, Any]) -> Counter[str]:
    kinds = Counter(token["kind"] for token in tokens)
    assert set(kinds) <= {"accepted", "alternative", "corrected", "plain"}
    assert len(tokens) == usage["completion_tokens"]
    assert kinds["accepted"] == usage["accepted_tokens"] <= usage["draft_tokens"]
    assert kinds["alternative"] == usage["alternatives_accepted"]
    assert kinds["alternative"] + kinds["corrected"] == usage["refusals"]
    return kinds


async def test_kinds_add_up_to_the_text_and_to_the_counters(pair: Pair) -> None:
    split = pair.device.generator.binding.mode == ""
    wanted = {"accepted", "corrected"} | ({"alternative", "plain"} if split else set())
    seen: Counter[str] = Counter()
    texts = ""
    for _ in range(10):  # a cloud that decodes by itself races with the drafts: which are judged is chance
        for prompt in PROMPTS:
            for fields in ({}, {"temperature": 0.9, "seed": 5}):
                text, tokens, usage, _ = await streamed(pair, prompt=prompt, **fields)
                seen += check_counts(tokens, usage)
                texts += text
        if wanted <= set(seen):
            break
    assert not texts.isascii()
    assert wanted <= set(seen)


async def test_kinds_with_stop_strings(pair: Pair) -> None:
    whole, every, _, _ = await streamed(pair, prompt=PROMPTS[0])
    for start in range(5, len(whole) - 4, 15):
        stop = whole[start : start + 3]
        text, tokens, usage, reason = await streamed(pair, prompt=PROMPTS[0], stop=[stop])
        assert (text, reason) == (whole[: whole.index(stop)], "stop")
        check_counts(tokens, usage)
        assert len(tokens) <= len(every)


async def test_a_whole_reply_has_them_too_and_only_where_they_are_asked_for(pair: Pair) -> None:
    body = {"model": MODEL, "max_tokens": NEW, "temperature": 0, "hat_token_kinds": True}
    chat = body | {"messages": [{"role": "user", "content": PROMPTS[1]}]}
    reply = (await pair.http.post("/v1/chat/completions", json=chat)).json()
    tokens = reply["choices"][0]["hat"]["tokens"]
    assert "".join(token["text"] for token in tokens) == reply["choices"][0]["message"]["content"]
    usage = reply["usage"]
    check_counts(tokens, usage["hat"] | {"completion_tokens": usage["completion_tokens"]})
    text, streamed_tokens, _, _ = await streamed(pair, "/v1/chat/completions", messages=chat["messages"])
    assert text == reply["choices"][0]["message"]["content"]
    assert [token["text"] for token in streamed_tokens] == [token["text"] for token in tokens]
    several = (await pair.http.post("/v1/completions", json=body | {"prompt": PROMPTS})).json()
    for choice in several["choices"]:
        assert "".join(token["text"] for token in choice["hat"]["tokens"]) == choice["text"]
    for asked in ({"hat_token_kinds": False}, {"hat_token_kinds": None}):
        plain = (await pair.http.post("/v1/chat/completions", json=chat | asked)).json()
        assert "hat" not in plain["choices"][0]
    refused = await pair.http.post("/v1/chat/completions", json=chat | {"hat_token_kinds": "yes"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "hat_token_kinds"
    assert '"yes"' in refused.json()["error"]["message"]


async def test_answers_side_by_side_keep_their_own_kinds(pair: Pair) -> None:
    found = await asyncio.gather(
        *(streamed(pair, prompt=prompt, seed=3, temperature=0.7) for prompt in PROMPTS)
    )
    for text, tokens, usage, _ in found:
        assert text
        check_counts(tokens, usage)
