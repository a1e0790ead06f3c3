"""The default model as `hat model prepare default` makes it: tokenizer, chat template, end of turn, damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from hat_runtime.model.manifest import Manifest, verify_files
from hat_runtime.model.prepare import prepare
from hat_runtime.model.weights import EMBED, TensorIndex, layer_of

pytestmark = pytest.mark.default_model


@pytest.fixture(scope="module")
def folder() -> Path:
    return prepare("default")


def test_text_survives_the_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (
        "héllo 🙂👩‍👩‍👧\n\n  def f(x):\n\treturn x + 1\r\n",
        "naïve 中文 العربية \u200b end",
        " a  b   c .  12  345\n  6",
        "<|im_start|>user\nhi<|im_end|>\n",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_single_ids(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer.encode(text) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [
        [0],
        [1],
        [2],
    ]


def test_digits_are_split_one_by_one_even_after_spaces(folder: Path) -> None:
    """As the model was trained; llama.cpp's pre-tokenizer "smollm" says so, GPT-2's pattern alone would not."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("x =  12\n  3") == ["x", "Ġ=", "ĠĠ", "1", "2", "ĊĠĠ", "3"]


def test_chat_template_is_chatml_with_the_models_own_system_prompt(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_turn_ends_with_im_end(folder: Path) -> None:
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 2
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 2


def test_shards_are_small_enough_for_parts(folder: Path) -> None:
    index = TensorIndex(folder)
    assert max((folder / shard).stat().st_size for shard in index.shards) < (65 << 20)
    cloud = index.shards_of(name for name in index.names if (layer_of(name) or 0) >= 12)
    assert index.info(EMBED).shard not in cloud


def test_a_damaged_cache_is_found_and_mended(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made again from the source, and nothing of the fetch is left."""
    copy = tmp_path / "models-2" / folder.name
    shutil.copytree(folder, copy)
    path = copy / "chat_template.jinja"
    path.write_text("nonsense")
    monkeypatch.setenv("HAT_CACHE", str(tmp_path))
    assert prepare("default") == copy
    manifest = verify_files(copy, deep=True)
    assert manifest.files["chat_template.jinja"] == Manifest.load(folder).files["chat_template.jinja"]
    assert manifest.weights_id == Manifest.load(folder).weights_id
    assert sorted(path.name for path in tmp_path.iterdir()) == ["locks", "models-2"]
