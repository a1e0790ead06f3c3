"""What identifies weights, files and configurations: sha256 over their content.

weights_id = sha256 over the sorted lines "name dtype shape sha256(content)" of the whole model's tensors.
model_revision = sha256 over weights_id and the configuration without keys that change no number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Keys of config.json that say nothing about the numbers the layers compute.
_VOLATILE = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class TensorDigest:
    """A tensor's dtype (safetensors' spelling), shape and sha256 of its raw little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class FileDigest:
    """A file's size in bytes and sha256."""

    size: int
    sha256: str


def weights_id(tensors: Mapping[str, TensorDigest]) -> str:
    """The id (64 hex digits) of a whole model's weights."""
    lines = (
        f"{name} {digest.dtype} {'x'.join(map(str, digest.shape))} {digest.sha256}\n"
        for name, digest in sorted(tensors.items())
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def model_revision(weights: str, config: Mapping[str, Any]) -> str:
    """The id (64 hex digits) of weights and configuration together; two sides that agree on it compute the same."""
    text = weights + json.dumps(_without_volatile(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def stored_dtype(dtypes: list[str]) -> str:
    """The dtype that most tensors have, in torch's spelling."""
    most = max(sorted(set(dtypes)), key=dtypes.count)
    return _TORCH_NAMES.get(most, most.lower())


def hash_file(path: Path) -> str:
    """sha256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_volatile(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_volatile(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _VOLATILE
    }
