"""Writing safetensors shards grouped by layer, so that a part of a model lies in few files.

A shard holds either the ends (embedding, norm, head), which only a device needs, or a run of layers. Tensors stream
through in pieces of a few MiB: memory stays bounded whatever the model's size.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hat_runtime.errors import ModelError
from hat_runtime.model.ids import FileDigest, TensorDigest
from hat_runtime.model.manifest import Progress
from hat_runtime.model.weights import EMBED, HEAD, INDEX_FILE, NORM, SINGLE_FILE, layer_of

BYTES_OF = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip


@dataclass(frozen=True)
class SourceTensor:
    """A tensor that can be read: dtype in safetensors' spelling, and its raw little-endian bytes in pieces."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Iterator[bytes]]

    @property
    def nbytes(self) -> int:
        """Size of the data.

        Raises:
            ModelError: a dtype that HAT cannot copy.
        """
        if self.dtype not in BYTES_OF:
            raise ModelError(
                f"tensor {self.name!r} has dtype {self.dtype!r}, which hat model prepare cannot copy"
            )
        return math.prod(self.shape) * BYTES_OF[self.dtype]


@dataclass(frozen=True)
class Written:
    """What write_shards wrote."""

    tensors: dict[str, TensorDigest]
    files: dict[str, FileDigest]


def plan_shards(tensors: Iterable[SourceTensor], max_bytes: int) -> list[list[SourceTensor]]:
    """Distribute tensors over shards of at most `max_bytes` (a larger single tensor gets its own).

    A layer is split only where it alone is larger than a shard.
    """
    groups: dict[tuple[int, int], list[SourceTensor]] = {}
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        layer = layer_of(tensor.name)
        key = (_END_ORDER.get(tensor.name, len(_END_ORDER)), -1) if layer is None else (_LAYERS, layer)
        groups.setdefault(key, []).append(tensor)
    shards: list[list[SourceTensor]] = []
    kind = None
    for key in sorted(groups):
        group = groups[key]
        in_layers = key[0] == _LAYERS
        size = sum(tensor.nbytes for tensor in group)
        if kind is not in_layers or _size(shards[-1]) + size > max_bytes:
            shards.append([])
        kind = in_layers
        for tensor in group:
            if shards[-1] and _size(shards[-1]) + tensor.nbytes > max_bytes:
                shards.append([])
            shards[-1].append(tensor)
    return shards


def write_shards(
    folder: Path, shards: list[list[SourceTensor]], progress: Progress | None = None, what: str = "writing"
) -> Written:
    """Write shards and, where there are several, model.safetensors.index.json; returns the digests of all of it.

    Raises:
        ModelError: a source delivers more or fewer bytes than its shape says.
        OSError: as the operating system has it (no space, ...); `hat_needed` is then the bytes of all shards.
    """
    total = sum(map(_size, shards))
    report = _Counter(progress, what, total)
    names = (
        [SINGLE_FILE]
        if len(shards) == 1
        else [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    )
    tensors: dict[str, TensorDigest] = {}
    files: dict[str, FileDigest] = {}
    try:
        for name, shard in zip(names, shards, strict=True):
            files[name] = _write_shard(folder / name, shard, tensors, report)
        if len(shards) > 1:
            weight_map = {
                tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
            }
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            text = (json.dumps(index, indent=1) + "\n").encode()
            (folder / INDEX_FILE).write_bytes(text)
            files[INDEX_FILE] = FileDigest(len(text), hashlib.sha256(text).hexdigest())
    except OSError as error:
        error.hat_needed = total  # type: ignore[attr-defined]
        raise
    return Written(tensors, files)


def digest_of(tensor: SourceTensor, report: Callable[[int], None] | None = None) -> TensorDigest:
    """Read a tensor to its end for its digest."""
    digest = hashlib.sha256()
    for piece in tensor.read():
        digest.update(piece)
        if report:
            report(len(piece))
    return TensorDigest(tensor.dtype, tensor.shape, digest.hexdigest())


_END_ORDER = {EMBED: 0, NORM: 1, HEAD: 2}
_LAYERS = len(_END_ORDER) + 1


class _Counter:
    def __init__(self, progress: Progress | None, what: str, total: int) -> None:
        self.progress, self.what, self.total, self.done = progress, what, total, 0

    def __call__(self, count: int) -> None:
        self.done += count
        if self.progress:
            self.progress(self.what, self.done, self.total)


def _size(shard: list[SourceTensor]) -> int:
    return sum(tensor.nbytes for tensor in shard)


def _write_shard(
    path: Path, shard: list[SourceTensor], tensors: dict[str, TensorDigest], report: Callable[[int], None]
) -> FileDigest:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    offset = 0
    for tensor in shard:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned, as safetensors' own writer has it
    whole = hashlib.sha256()
    with path.open("wb") as file:
        for start in (len(text).to_bytes(8, "little"), text):
            file.write(start)
            whole.update(start)
        for tensor in shard:
            digest = hashlib.sha256()
            count = 0
            for piece in tensor.read():
                file.write(piece)
                digest.update(piece)
                whole.update(piece)
                count += len(piece)
                report(len(piece))
            if count != tensor.nbytes:
                raise ModelError(f"tensor {tensor.name!r} has {count} bytes, its shape says {tensor.nbytes}")
            tensors[tensor.name] = TensorDigest(tensor.dtype, tensor.shape, digest.hexdigest())
    return FileDigest(8 + len(text) + offset, whole.hexdigest())
