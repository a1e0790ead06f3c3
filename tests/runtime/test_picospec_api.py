"""The OpenAI API over token mode, and `hat generate`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hat_runtime.cloud.serve import CloudConfig, running_cloud
from hat_runtime.device.chat import PromptEncoder
from hat_runtime.device.sampling import SamplingParams
from hat_runtime.device.token_answer import SpeculationConfig
from hat_runtime.errors import CloudUnavailable
from hat_runtime.model.hf import load_tokenizer
from tests.runtime.api_pair import MODEL, Pair, cloud_config, device_for
from tests.runtime.picospec_pair import Whole, perturbed, picospec
from tests.runtime.test_generator import make_prompts
from tests.tiny_chat import make_tiny_chat_model

WAITING = SpeculationConfig(ahead=1, adaptive=False)
"""The cloud waits for drafts, which a tiny model's own decoding would overtake."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture(scope="module")
def draft(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return perturbed(folder, tmp_path_factory.mktemp("chat") / "draft", 0.01)


@pytest.fixture
async def pair(folder: Path, draft: Path) -> AsyncIterator[Pair]:
    async with (
        running_cloud(cloud_config(folder, mode="picospec", input_layers=None)) as cloud,
        device_for(cloud, folder, mode="picospec", draft_model=draft, speculation=WAITING) as pair,
    ):
        yield pair
        await pair.all_free()


async def test_completions_stream_seed_stop_and_usage(pair: Pair, folder: Path) -> None:
    tokenizer, whole = load_tokenizer(folder), Whole(folder)
    prompt = tokenizer.encode("The quick brown fox")
    eos = pair.device.generator.model.eos_token_ids
    for params in (SamplingParams(), SamplingParams(0.8, 0.9, 17)):
        want = whole.decode(prompt, 24, params, eos)
        fields = {"temperature": params.temperature, "top_p": params.top_p, "seed": params.seed}
        reply = await pair.openai.completions.create(model=MODEL, prompt=prompt, max_tokens=24, **fields)
        shown = PromptEncoder(tokenizer).detokenizer.stream()
        assert reply.choices[0].text == "".join(map(shown.feed, want)) + shown.finish()
        assert reply.usage is not None
        assert reply.usage.completion_tokens == len(want)
        hat = reply.usage.model_extra["hat"]  # type: ignore[index]
        assert 0 < hat["accepted_tokens"] <= hat["draft_tokens"]
        stream = await pair.openai.completions.create(
            model=MODEL, prompt=prompt, max_tokens=24, stream=True, **fields
        )
        text = "".join([chunk.choices[0].text async for chunk in stream])
        assert text == reply.choices[0].text
        stop = text[len(text) // 2 :][:3]
        cut = await pair.openai.completions.create(
            model=MODEL, prompt=prompt, max_tokens=24, stop=[stop], **fields
        )
        assert cut.choices[0].text == text[: text.index(stop)]
        assert cut.choices[0].finish_reason == "stop"


async def test_chat_and_readiness(pair: Pair) -> None:
    chat = pair.openai.chat.completions
    message = {"role": "user", "content": "Hello"}
    answers = await asyncio.gather(
        *(chat.create(model=MODEL, messages=[message], max_tokens=20, temperature=0) for _ in range(4))  # type: ignore[list-item]
    )
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    assert (await pair.http.get("/readyz")).status_code == 200
    metrics = (await pair.http.get("/metrics")).text
    assert "hat_draft_tokens_total" in metrics


async def test_a_cloud_that_goes_away_ends_the_answer(tiny_llama: Path) -> None:
    from hat_runtime.device.generator import GenerationRequest, GeneratorConfig
    from hat_runtime.device.recovery import RecoveryConfig
    from hat_runtime.device.token_connect import connect_tokens

    prompt = make_prompts(1)[0]
    for gamma in (0, 4):
        config = CloudConfig(tiny_llama, mode="picospec", dtype="float32", kv_pages=64, drain_s=0.0)
        async with running_cloud(config) as cloud:
            speculation = SpeculationConfig(gamma)
            generator = await connect_tokens(
                tiny_llama,
                tiny_llama,
                cloud.address,
                "float32",
                speculation=speculation,
                config=GeneratorConfig(recovery=RecoveryConfig(reconnect_for_s=0.5)),
            )
            request = GenerationRequest(prompt, 400)
            events = aiter(generator.generate(request))
            await anext(events)
        with pytest.raises(CloudUnavailable):
            _ = [event async for event in events]
        assert request.stats.finish_reason == "error"
        await generator.model.call(lambda generator=generator: generator.model.cache.check([]))  # type: ignore[misc]
        await generator.close()


async def test_a_full_device_says_so(tiny_llama: Path) -> None:
    from hat_runtime.device.generator import GenerationRequest
    from hat_runtime.device.submodels import DeviceFull

    async with picospec(tiny_llama, tiny_llama, kv_tokens=64) as (generator, _):
        with pytest.raises(DeviceFull, match="KV cache is full"):
            _ = [event async for event in generator.generate(GenerationRequest([7] * 200, 5))]
        short = GenerationRequest([7] * 30, 5)
        assert len([event async for event in generator.generate(short)]) == 5


async def test_hat_generate(folder: Path, draft: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"question": "one two"}\n{"task_id": "a", "prompt": "The lazy"}\n')
    common = ["--prompts", str(prompts), "--model", str(folder), "--max-new-tokens", "12", "--json"]
    async with running_cloud(cloud_config(folder, mode="picospec", input_layers=None)) as cloud:
        tokens = []
        for options in (
            ["--cloud", cloud.address, "--mode", "picospec", "--draft-model", str(draft)],
            ["--cloud", cloud.address, "--mode", "picospec", "--draft-model", str(draft), "--max-draft", "0"],
            ["--local"],
        ):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "hat_runtime.cli.main", "generate", *common, "--dtype", "float32", *options,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            out, errors = await process.communicate()
            assert process.returncode == 0, errors.decode()
            tokens.append([json.loads(line)["token_ids"] for line in out.splitlines()])
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--draft-model", "x"], "--draft-model x goes with --mode picospec"),
        (["--sampler", "topk"], "--sampler 'topk': must be one of coupled, rejection"),
        (
            ["--mode", "picospec", "--draft-model", "x", "--drafter", "ngram"],
            "--drafter ngram does not go with",
        ),
        (["--mode", "picospec", "--draft-model", "x", "--window", "0"], "--window 0: must be 1 or more"),
        (["--mode", "picospec", "--draft-model", "x", "--max-draft", "40"], "--max-draft 40 x --window 2"),
    ],
)
async def test_options_that_do_not_go_together(folder: Path, options: list[str], wanted: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hat_runtime.cli.main", "device", "serve", "--model", str(folder),
        "--cloud", "127.0.0.1:9", *options, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert wanted in errors.decode()
