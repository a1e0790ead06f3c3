"""Reading a GGUF file (llama.cpp's format) by transformers' own tables of names and layouts.

`from_pretrained(gguf_file=...)` would do, but it insists on the package accelerate only to place the tensors; the
reader beneath it needs just `gguf`. Configuration and tokenizer come by the public way.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hat_runtime.errors import ModelError
from hat_runtime.model.shards import SourceTensor
from hat_runtime.model.sources import Opened

# llama.cpp's pre-tokenizers that split digits one by one before GPT-2's pattern (src/llama-vocab.cpp); transformers
# reads them as plain GPT-2, which differs for digits after two spaces or a line break.
_SINGLE_DIGITS = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)
_SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16"}


def open_gguf(path: Path, label: str, dtype: str) -> Opened:
    """Read the file and dequantise its tensors to `dtype`; they stay in memory until written.

    Raises:
        ModelError: the package gguf is missing, or the file is damaged or of an unsupported architecture.
    """
    if find_spec("gguf") is None:
        raise ModelError(f"reading {path.name} needs the package gguf: pip install hat-platform[convert]")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        config = AutoConfig.from_pretrained(**place)
        tokenizer = AutoTokenizer.from_pretrained(**place)
        with torch.device("meta"):  # only its names and shapes are used
            skeleton = AutoModelForCausalLM.from_config(config)
        with redirect_stderr(
            io.StringIO()
        ):  # it has a progress bar of its own, on terminals and in logs alike
            content = load_gguf_checkpoint(
                str(path), return_tensors=True, model_to_load=skeleton, torch_dtype=getattr(torch, dtype)
            )
        tensors: dict[str, Any] = content["tensors"]
    except (ValueError, KeyError, IndexError, OSError, RuntimeError, struct.error) as error:
        raise ModelError(f"cannot read {path} as GGUF: {type(error).__name__}: {error}") from error
    _check_complete(path, skeleton, tensors)
    if content["tokenizer"].get("pre_tokenizer_type") in _SINGLE_DIGITS:
        _split_digits(tokenizer)
    tokenizer.model_max_length = config.max_position_embeddings
    settings = config.to_dict()
    settings.pop("_name_or_path", None)
    settings.pop("_model_name_or_path", None)
    settings |= {"dtype": dtype, "architectures": [type(skeleton).__name__]}

    def write_side_files(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        skeleton.generation_config.eos_token_id = _eos_ids(config, tokenizer)
        skeleton.generation_config.save_pretrained(folder)

    return Opened(
        label=label,
        config=settings,
        tensors={name: _source(name, tensor) for name, tensor in tensors.items()},
        write_side_files=write_side_files,
    )


def _check_complete(path: Path, skeleton: Any, tensors: dict[str, Any]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"{path}: tensor {name} has shape {found.get(name)}, its model needs {expected.get(name)}"
        )


def _split_digits(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    fast = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    fast.pre_tokenizer = pre_tokenizers.Sequence([digits, fast.pre_tokenizer])


def _eos_ids(config: Any, tokenizer: Any) -> int | list[int]:
    """The tokenizer's eos comes first: chat models end a turn with it, whatever the base model's configuration said."""
    configured = config.eos_token_id
    more = configured if isinstance(configured, list) else [configured]
    ids = list(dict.fromkeys(token for token in [tokenizer.eos_token_id, *more] if token is not None))
    if not ids:
        raise ModelError("the GGUF file names no eos token (tokenizer.ggml.eos_token_id)")
    return ids[0] if len(ids) == 1 else ids


def _source(name: str, tensor: Any) -> SourceTensor:
    import torch

    def read() -> Iterator[bytes]:
        yield tensor.contiguous().view(torch.uint8).numpy().tobytes()

    return SourceTensor(
        name, _SAFETENSORS_NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), read
    )
