"""Tiny random models of every supported architecture, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig

TINY = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # wide enough that greedy choices are not ties
}
MIXED = [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full", "full")]


def _llama() -> PretrainedConfig:
    return LlamaConfig(**TINY, tie_word_embeddings=True)


def _mistral() -> PretrainedConfig:
    return MistralConfig(**TINY, sliding_window=24)


def _qwen2() -> PretrainedConfig:
    sizes = {key: value for key, value in TINY.items() if key != "head_dim"}
    return Qwen2Config(**sizes, use_sliding_window=True, sliding_window=16, layer_types=MIXED)


def _qwen3() -> PretrainedConfig:
    return Qwen3Config(**TINY)


def _qwen3_moe() -> PretrainedConfig:
    return Qwen3MoeConfig(
        **TINY,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[1, 3],
        norm_topk_prob=True,
    )


def _gemma3() -> PretrainedConfig:
    return Gemma3TextConfig(**TINY, sliding_window=20, layer_types=MIXED, query_pre_attn_scalar=16)


ARCHITECTURES = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma3_text": _gemma3,
}


def make_tiny_model(architecture: str, folder: Path, seed: int = 0) -> Path:
    """A random float32 model, saved in several shards so that partial reads matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]()).float().eval()
    with torch.no_grad():  # norms differ from 1 so that a skipped or doubled norm shows
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder
