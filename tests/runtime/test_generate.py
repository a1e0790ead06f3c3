"""`hat generate`: the local reference is transformers alone, and a cloud gives the same tokens."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hat_runtime.cli.main import main
from hat_runtime.cloud.serve import CloudConfig, running_cloud
from tests.tiny_chat import make_tiny_chat_model

PROMPTS = Path(__file__).parent.parent / "data" / "prompts.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short ones: a chat message, a task, one that exceeds the tiny model's context, and one more."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [
        {"question_id": 7, "turns": ["What is a naïve café?"]},
        {"task_id": "Own/0", "prompt": "The quick brown "},
        {"prompt": "long " * 600},
        {"question": "one two three"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def generate(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[dict[str, Any]]]:
    code = main(["generate", "--dtype", "float32", "--json", *map(str, arguments)])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_local_is_what_a_ten_line_script_gives(
    model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, records = generate(
        capsys, "--prompts", prompts, "--model", model, "--local", "--max-new-tokens", 12
    )

    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is a naïve café?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    raw = tokenizer("The quick brown ", return_tensors="pt")
    for record, inputs in zip(records, (chat, raw), strict=False):
        output = whole.generate(**inputs, max_new_tokens=12, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        assert record["token_ids"] == output.tolist()
        assert record["text"] == tokenizer.decode(output, skip_special_tokens=True)
        assert record["prompt_tokens"] == inputs["input_ids"].shape[1]

    assert code == 1
    assert [record["id"] for record in records] == [7, "Own/0", 3, 4]
    assert "context is 512" in records[2]["error"]
    for record in records[:2]:
        assert record["ttft_s"] > 0
        assert record["tbt_s"] > 0
        assert record["uplink_bytes"] == record["downlink_bytes"] == record["rounds"] == 0


async def test_a_cloud_gives_the_references_tokens(
    model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--prompts", prompts, "--model", model, "--max-new-tokens", 12)
    _, expected = await asyncio.to_thread(generate, capsys, *common, "--local")
    async with running_cloud(CloudConfig(model, input_layers=2, dtype="float32")) as cloud:
        for options in ((), ("--concurrency", 3, "--chunk-tokens", 5), ("--chunk-tokens", 0)):
            code, records = await asyncio.to_thread(
                generate, capsys, *common, "--cloud", cloud.address, *options
            )
            assert code == 1
            assert "context is 512" in records[2]["error"]
            for record, reference in zip(records, expected, strict=True):
                assert record["id"] == reference["id"]
                assert record["prompt_tokens"] == reference["prompt_tokens"]
                if "error" not in record:
                    assert record["token_ids"] == reference["token_ids"]
                    assert record["text"] == reference["text"]
                    assert record["finish_reason"] == reference["finish_reason"]
                    assert record["rounds"] == len(record["token_ids"])
                    # Float32 hidden states of width 64 up for all tokens but the last, down for the new ones.
                    passed = record["prompt_tokens"] + len(record["token_ids"]) - 1
                    assert 1.0 < record["uplink_bytes"] / (passed * 64 * 4) < 1.6
                    assert 1.0 < record["downlink_bytes"] / (len(record["token_ids"]) * 64 * 4) < 1.6


async def test_a_codec_makes_the_uplink_smaller(
    model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--prompts", prompts, "--model", model, "--max-new-tokens", 12, "--limit", 1)
    async with running_cloud(CloudConfig(model, input_layers=2, dtype="float32")) as cloud:
        for codecs, prompt_row, row in (("int4", 82, 256), ("int8,bf16", 116, 128)):
            code, [record] = await asyncio.to_thread(
                generate, capsys, *common, "--cloud", cloud.address, "--uplink-codec", codecs
            )
            assert code == 0
            rows = record["prompt_tokens"] * prompt_row + (len(record["token_ids"]) - 1) * row
            assert rows < record["uplink_bytes"] < rows + 600


async def test_seeded_sampling_does_not_depend_on_concurrency_or_chunks(
    model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common: tuple[object, ...] = (
        "--prompts",
        prompts,
        "--model",
        model,
        "--max-new-tokens",
        16,
        "--limit",
        2,
    )
    async with running_cloud(CloudConfig(model, input_layers=2, dtype="float32")) as cloud:
        common += ("--temperature", 1, "--cloud", cloud.address)
        _, alone = await asyncio.to_thread(generate, capsys, *common, "--seed", 5)
        _, batch = await asyncio.to_thread(
            generate, capsys, *common, "--seed", 5, "--concurrency", 2, "--chunk-tokens", 3
        )
        _, other = await asyncio.to_thread(generate, capsys, *common, "--seed", 6)
    tokens = [[record["token_ids"] for record in records] for records in (alone, batch, other)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_without_json_people_read_the_text(
    model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prompts", str(prompts), "--model", str(model), "--local", "--max-new-tokens", "4"]
    assert main(["generate", *arguments, "--limit", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("== 7 (")
    assert "answering prompts: 100 %" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--local", "--temperature", "1"), "--temperature goes with --cloud"),
        (("--local", "--concurrency", "2"), "--concurrency goes with --cloud"),
        (("--local", "--uplink-codec", "int8"), "--uplink-codec goes with --cloud"),
        (("--cloud", "localhost:1", "--uplink-codec", "zip"), "codec 'zip' is none of raw, bf16, int8, int4"),
        (("--local", "--max-new-tokens", "0"), "--max-new-tokens 0"),
        (("--cloud", "nowhere"), "--cloud: 'nowhere' is not HOST:PORT"),
        (("--cloud", "127.0.0.1:1", "--top-p", "0"), "top_p is 0"),
    ],
)
def test_wrong_arguments(
    model: Path, prompts: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--prompts", str(prompts), "--model", str(model), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_cloud_is_said_in_words(model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompts", str(prompts), "--model", str(model), "--cloud", "127.0.0.1:1"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err
