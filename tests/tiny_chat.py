"""Tiny models with a real tokenizer and a chat template, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama import LlamaConfig

from tests.tiny_models import TINY

SPECIALS = ["<pad>", "<s>", "<|end|>", "<|start|>", "<unk>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "A model is cut in three, and only hidden states cross the network.",
    "Zwei Köche sind des Breies Tod; déjà vu, naïve café.",
    "one two three four five six seven eight nine ten",
]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] == 'assistant' %}{{ raise_exception('An assistant cannot begin.') }}{% endif %}"
    "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2's: spaces are ▁, characters outside the vocabulary are tokens for their UTF-8 bytes."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    merges = [tuple(pair) for pair in _state(trained)["model"]["merges"]]
    tokens = SPECIALS + [f"<0x{byte:02X}>" for byte in range(256)] + sorted(trained.get_vocab())
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def byte_level_tokenizer() -> Tokenizer:
    """As GPT-2's and SmolLM's: every token is a run of bytes, which may end within a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, "🙂🎉🙂 漢字"], trainer)
    return tokenizer


def wrap(tokenizer: Tokenizer) -> Any:
    """The transformers tokenizer of a tokenizers one, with the chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


def make_tiny_chat_model(folder: Path, *, seed: int = 2) -> Path:
    """A random Llama with the byte-fallback tokenizer, whose embedding is padded beyond the vocabulary.

    With seed 2, greedy answers are long.
    """
    tokenizer = wrap(byte_fallback_tokenizer())
    torch.manual_seed(seed)
    config = LlamaConfig(**(TINY | {"vocab_size": len(tokenizer) + 3}), tie_word_embeddings=True)
    model = LlamaForCausalLM(config).float().eval()
    model.save_pretrained(folder, max_shard_size="200KB")
    tokenizer.save_pretrained(folder)
    return folder


def _state(tokenizer: Tokenizer) -> Any:
    return json.loads(tokenizer.to_str())
