"""A folder of safetensors seen as one index: what is in it, without reading it.

Headers are read by hand, shard by shard and only when asked for: a part of a model touches only its own shards.
Format: 8 bytes little-endian header length, JSON header, tensor data (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hat_runtime.errors import ModelError

Part = Literal["all", "device", "cloud"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_COPY_BYTES = 4 << 20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's place: dtype in safetensors' spelling ("BF16"), `nbytes` bytes at `offset` of the file `shard`."""

    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset: int
    nbytes: int


def layer_of(name: str) -> int | None:
    """The decoder layer that a tensor belongs to, or None for embedding, norm, head and anything else."""
    found = _LAYER.match(name)
    return int(found.group(1)) if found else None


def part_names(names: Iterable[str], part: Part, input_layers: int, tied: bool) -> list[str]:
    """The tensors that a part of the model needs, in the given order.

    Args:
        part: "device" (embedding, layers < input_layers, final norm and, unless `tied`, the head), "cloud" (layers >=
            input_layers, nothing else) or "all".
        tied: the head is the embedding, so that a stored copy of it is not needed.
    """
    if part == "all":
        return list(names)
    if part == "cloud":
        return [name for name in names if (layer := layer_of(name)) is not None and layer >= input_layers]
    ends = {EMBED, NORM} if tied else {EMBED, NORM, HEAD}
    return [
        name
        for name in names
        if name in ends or ((layer := layer_of(name)) is not None and layer < input_layers)
    ]


class TensorIndex:
    """The tensors of a folder: names at once; shapes, dtypes and data from a shard only when asked for."""

    def __init__(self, folder: Path) -> None:
        """Open `folder` by its index file or its single model.safetensors.

        Raises:
            ModelError: no such folder, no safetensors in it, or an index that cannot be read.
        """
        self.folder = folder
        self._headers: dict[str, dict[str, TensorInfo]] = {}
        index = folder / INDEX_FILE
        if index.is_file():
            self._shard_of = _read_index(index)
        elif (folder / SINGLE_FILE).is_file():
            self._shard_of = dict.fromkeys(self._header(SINGLE_FILE), SINGLE_FILE)
        else:
            raise ModelError(_nothing_to_read(folder))

    def __contains__(self, name: object) -> bool:
        return name in self._shard_of

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._shard_of)

    @property
    def shards(self) -> list[str]:
        """All shards' file names, sorted."""
        return sorted(set(self._shard_of.values()))

    def shards_of(self, names: Iterable[str]) -> list[str]:
        """The shards that hold these tensors, sorted."""
        return sorted({self._shard_of[name] for name in names})

    def info(self, name: str) -> TensorInfo:
        """One tensor's dtype, shape and place; reads the header of its shard.

        Raises:
            ModelError: unknown tensor, or its shard is missing, damaged or lacks it.
        """
        shard = self._shard_of.get(name)
        if shard is None:
            raise ModelError(f"{self.folder} holds no tensor {name!r}")
        info = self._header(shard).get(name)
        if info is None:
            raise ModelError(
                f"{self.folder / shard} lacks the tensor {name!r} that {INDEX_FILE} places there"
            )
        return info

    def select(self, predicate: Callable[[str], bool]) -> dict[str, Any]:
        """Lazy slices (safetensors' PySafeSlice, framework "pt") of the tensors that `predicate` picks by name.

        Opens only the shards that hold them; `slice[:]` or `slice[...]` reads the data.
        """
        from safetensors import safe_open

        chosen = [name for name in self.names if predicate(name)]
        slices: dict[str, Any] = {}
        for shard in self.shards_of(chosen):
            self._header(shard)  # our words for a missing or damaged file
            with safe_open(self.folder / shard, framework="pt") as handle:
                for name in chosen:
                    if self._shard_of[name] == shard:
                        self.info(name)
                        slices[name] = handle.get_slice(name)
        return slices

    def read(self, name: str) -> Iterator[bytes]:
        """A tensor's raw bytes in pieces of a few MiB, whatever its size."""
        info = self.info(name)
        with (self.folder / info.shard).open("rb") as file:
            file.seek(info.offset)
            left = info.nbytes
            while left:
                piece = file.read(min(_COPY_BYTES, left))
                if not piece:
                    raise ModelError(f"{self.folder / info.shard} ends inside the tensor {name!r}")
                left -= len(piece)
                yield piece

    def _header(self, shard: str) -> dict[str, TensorInfo]:
        if shard not in self._headers:
            self._headers[shard] = read_header(self.folder / shard)
        return self._headers[shard]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file.

    Raises:
        ModelError: the file is missing, is no safetensors file, or is shorter or longer than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"header length {length} in a file of {size} bytes")
            header = json.loads(file.read(length))
        start = 8 + length
        infos = {
            name: TensorInfo(
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                shard=path.name,
                offset=start + entry["data_offsets"][0],
                nbytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
        end = max((info.offset + info.nbytes for info in infos.values()), default=start)
        if end != size:
            raise ValueError(f"{size} bytes, its header says {end}")
    except FileNotFoundError as error:
        raise ModelError(f"the shard {path} is missing; fetch the model again") from error
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            f"{path} is damaged or no safetensors file: {error}; fetch or prepare the model again"
        ) from error
    return infos


def _read_index(path: Path) -> dict[str, str]:
    try:
        shard_of = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(shard_of, dict) or not shard_of:
            raise ValueError("weight_map is empty")
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged: {error}; fetch or prepare the model again") from error
    for shard in shard_of.values():
        # An index is data from elsewhere: it must not lead outside the model's folder.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ModelError(f"{path}: weight_map names {shard!r}, which is no plain file name")
    return shard_of


def _nothing_to_read(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is no folder"
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
        return (
            f"{folder} holds only pickle weights ({pickles[0].name}), which run code when they are read; "
            "convert them to safetensors first (AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW))"
        )
    return f"{folder} holds neither {INDEX_FILE} nor {SINGLE_FILE}"
