"""Where a model comes from: a folder of safetensors, a GGUF file, the Hugging Face hub, or HAT's default model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hat_runtime.errors import ModelError, UsageError
from hat_runtime.model.ids import TensorDigest
from hat_runtime.model.manifest import MANIFEST_FILE, Manifest, read_config
from hat_runtime.model.shards import SourceTensor
from hat_runtime.model.weights import TensorIndex

Kind = Literal["default", "folder", "gguf", "hub"]

# What a tokenizer and generation need, under all the names that are in use.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TARGETS = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Opened:
    """A source whose configuration is read and whose tensors can be."""

    label: str
    """For the manifest: where it came from, in words."""
    config: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]
    write_side_files: Callable[[Path], None]
    """Writes generation_config and tokenizer into a folder."""
    digests: Mapping[str, TensorDigest] | None = None
    """Of the whole model, where a manifest tells them."""
    hub_files_id: str | None = None
    """The weights_id of a hub repository without a manifest: from its list of files."""


def kind_of(source: str) -> Kind:
    """What the user named.

    Raises:
        UsageError: neither "default", nor a folder, nor a .gguf file, nor shaped like a hub id.
    """
    path = Path(source).expanduser()
    if not source:
        raise UsageError(
            "the model source is empty; name a folder, a .gguf file or a hub id, or write default"
        )
    if source == "default":
        return "default"
    if path.is_dir():
        return "folder"
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"no such file: {source!r}")
        return "gguf"
    if _HUB_ID.fullmatch(source) and not path.exists():
        return "hub"
    raise UsageError(
        f"{source!r} is no folder, no .gguf file and no hub id (like ORGANISATION/NAME); or write default"
    )


def open_folder(folder: Path, dtype: str | None, label: str | None = None) -> Opened:
    """Open a Hugging Face folder of safetensors; nothing is read yet but configuration and names.

    Args:
        folder: may lack shards that the caller will not read.
        dtype: "float32", "bfloat16", or None to keep what is stored.

    Raises:
        ModelError: no config.json, no safetensors, or a quantised model that is to be converted.
    """
    config = read_config(folder)
    index = TensorIndex(folder)
    if dtype is not None:
        if "quantization_config" in config:
            raise ModelError(f"{folder} is quantised; --dtype {dtype} cannot convert it, leave --dtype out")
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}

    def write_side_files(target: Path) -> None:
        for name in SIDE_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)

    digests = Manifest.load(folder).tensors if (folder / MANIFEST_FILE).is_file() else None
    return Opened(
        label=label or folder.resolve().name,
        config=config,
        tensors=LazyTensors(index, dtype),
        write_side_files=write_side_files,
        digests=digests if digests and _unchanged(digests, dtype) else None,
    )


class LazyTensors(Mapping[str, SourceTensor]):
    """The tensors of an index; a shard's header is read when one of its tensors is asked for."""

    def __init__(self, index: TensorIndex, dtype: str | None) -> None:
        self._index, self._dtype, self._names = index, dtype, index.names

    def __getitem__(self, name: str) -> SourceTensor:
        info = self._index.info(name)
        stored = SourceTensor(name, info.dtype, info.shape, lambda: self._index.read(name))
        return converted(stored, self._dtype) if self._dtype is not None else stored

    def __contains__(self, name: object) -> bool:
        return name in self._index  # asked without opening a shard

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def converted(tensor: SourceTensor, dtype: str) -> SourceTensor:
    """The same tensor in "float32" or "bfloat16" (round to nearest even); integers stay as they are."""
    if tensor.dtype not in _FLOATS or _FLOATS[tensor.dtype] == dtype:
        return tensor

    def read() -> Iterator[bytes]:
        import torch

        stored = torch.frombuffer(
            bytearray(b"".join(tensor.read())), dtype=getattr(torch, _FLOATS[tensor.dtype])
        )
        yield stored.to(getattr(torch, dtype)).view(torch.uint8).numpy().tobytes()

    return replace(tensor, dtype=_TARGETS[dtype], read=read)


def _unchanged(digests: Mapping[str, TensorDigest], dtype: str | None) -> bool:
    return dtype is None or all(
        digest.dtype not in _FLOATS or _FLOATS[digest.dtype] == dtype for digest in digests.values()
    )
