"""`hat model prepare`: from any source to a folder that both sides can load by parts and identify."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from hat_runtime.errors import ModelError, UsageError
from hat_runtime.model import default_model
from hat_runtime.model.cache import lock, models_dir
from hat_runtime.model.gguf import open_gguf
from hat_runtime.model.hub import open_hub
from hat_runtime.model.ids import (
    FileDigest,
    TensorDigest,
    hash_file,
    model_revision,
    stored_dtype,
    weights_id,
)
from hat_runtime.model.manifest import (
    BY_HUB_FILES,
    BY_TENSORS,
    MANIFEST_FILE,
    Manifest,
    PartSpan,
    Progress,
    identity,
    layer_count,
    verify_files,
)
from hat_runtime.model.shards import SourceTensor, Written, digest_of, plan_shards, write_shards
from hat_runtime.model.sources import Kind, Opened, kind_of, open_folder
from hat_runtime.model.split import cloud_layers, device_layers
from hat_runtime.model.store import check_replaceable, check_space, new_folder
from hat_runtime.model.weights import EMBED, HEAD, NORM, Part, layer_of, part_names

MAX_SHARD_BYTES = 512 << 20
MAX_SHARD_BYTES_DEFAULT_MODEL = 64 << 20
_SIDE_BYTES = 32 << 20
"""Room for configuration and tokenizer when free space is checked."""

log = logging.getLogger(__name__)


def prepare(
    source: str,
    out: Path | None = None,
    part: Part = "all",
    input_layers: int | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a model, or one side's part of it, as a folder with hat_manifest.json; returns the folder.

    A folder that already holds exactly this is checked and kept.

    Args:
        source: "default", a folder of safetensors, a .gguf file or a hub id.
        out: default: a folder of the cache, named by source, part and dtype.
        part: "device" and "cloud" need `input_layers`, the number m of layers on the device.
        dtype: "float32" or "bfloat16"; None keeps what is stored (bfloat16 where that is quantised GGUF).

    Raises:
        UsageError: wrong arguments, or `out` holds something else.
        ModelError: the source cannot be used.
        HatError: no space, no network, no right to write.
    """
    if part != "all" and input_layers is None:
        raise UsageError(f"--part {part} needs --input-layers: the number of layers that run on the device")
    if part == "all" and input_layers is not None:
        raise UsageError("--input-layers goes with --part device or --part cloud")
    kind = kind_of(source)
    if kind == "default":
        whole = _prepare_default(dtype or "bfloat16", progress)
        if part == "all" and out is None:
            return whole
        opened, shard_bytes = open_folder(whole, None, default_model.LABEL), MAX_SHARD_BYTES_DEFAULT_MODEL
    else:
        opened, shard_bytes = _open(kind, source, part, input_layers or 0, dtype, progress), MAX_SHARD_BYTES
    target = out if out is not None else _cached_folder(kind, source, part, input_layers, dtype)
    if kind == "folder" and target.resolve() == Path(source).expanduser().resolve():
        raise UsageError(f"--out {target} is the source itself")
    span = span_of(part, input_layers or 0, layer_count(opened.config))
    with lock(target):
        if out is not None:
            check_replaceable(target)
        foreign = kind == "folder" and dtype is None and opened.digests is None
        if foreign and (part != "all" or target.exists()):  # the whole is hashed once for all its parts
            opened = replace(opened, digests=identity(Path(source).expanduser(), progress).tensors)
        if not _is_already(target, opened, span):
            _write(target, opened, span, shard_bytes, progress)
    return target


def span_of(part: Part, input_layers: int, num_layers: int) -> PartSpan:
    """The layers that a part stores.

    Raises:
        UsageError: a split that leaves one side without layers.
    """
    if part == "all":
        return PartSpan("all", 0, num_layers)
    layers = (device_layers if part == "device" else cloud_layers)(input_layers, num_layers)
    return PartSpan(part, layers.lo, layers.hi)


def _prepare_default(dtype: str, progress: Progress | None) -> Path:
    target = models_dir() / f"{default_model.NAME}-{dtype}"
    with lock(target):
        if target.exists():
            try:
                verify_files(target, deep=True)
                return target
            except ModelError as error:
                log.warning("%s; preparing it again", str(error).removesuffix("; prepare the model again"))
        check_space(target, 2 * default_model.PARAMETERS * (4 if dtype == "float32" else 2))
        with default_model.gguf_file(progress) as path:
            if progress:
                progress("reading the default model", 0, 1)
            opened = open_gguf(path, default_model.LABEL, dtype)
            if progress:
                progress("reading the default model", 1, 1)
            span = span_of("all", 0, layer_count(opened.config))
            _write(target, opened, span, MAX_SHARD_BYTES_DEFAULT_MODEL, progress)
    return target


def _open(
    kind: Kind, source: str, part: Part, input_layers: int, dtype: str | None, progress: Progress | None
) -> Opened:
    path = Path(source).expanduser()
    if kind == "folder":
        return open_folder(path, dtype)
    if kind == "gguf":
        return open_gguf(path, path.name, dtype or "bfloat16")
    return open_hub(source, part, input_layers, dtype, progress)


def _cached_folder(kind: Kind, source: str, part: Part, input_layers: int | None, dtype: str | None) -> Path:
    """A name that a person recognises; local sources of one name are told apart by their place."""
    if kind == "default":
        name = f"{default_model.NAME}-{dtype or 'bfloat16'}"
    elif kind == "hub":
        name = source.replace("/", "--")
    else:
        place = Path(source).expanduser().resolve()
        stem = re.sub(r"[^\w.-]", "_", place.stem if kind == "gguf" else place.name)
        name = f"{stem}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
    if dtype is not None and kind != "default":
        name += f"-{dtype}"
    if part != "all":
        name += f"-{part}-m{input_layers}"
    return models_dir() / name


def _identity_of(
    opened: Opened, written: Mapping[str, TensorDigest]
) -> tuple[str, str, dict[str, TensorDigest]]:
    """(weights_id, its basis, tensors for the manifest)."""
    if opened.digests is not None:
        return weights_id(opened.digests), BY_TENSORS, dict(opened.digests)
    if opened.hub_files_id is not None:
        return opened.hub_files_id, BY_HUB_FILES, {}
    return weights_id(written), BY_TENSORS, dict(written)


def _is_already(target: Path, opened: Opened, span: PartSpan) -> bool:
    """Whether `target` holds this part of these weights, undamaged."""
    if not (target / MANIFEST_FILE).is_file() or (opened.digests is None and opened.hub_files_id is None):
        return False
    try:
        there = verify_files(target, deep=True)
    except ModelError as error:
        log.warning("%s; preparing it again", str(error).removesuffix("; prepare the model again"))
        return False
    weights, _, _ = _identity_of(opened, {})
    return there.part == span and there.model_revision == model_revision(weights, opened.config)


def _write(target: Path, opened: Opened, span: PartSpan, shard_bytes: int, progress: Progress | None) -> None:
    names = _needed(opened, span)
    shards = plan_shards((opened.tensors[name] for name in names), shard_bytes)
    check_space(target, sum(tensor.nbytes for shard in shards for tensor in shard) + _SIDE_BYTES)
    with new_folder(target, owned=target.parent == models_dir()) as folder:
        written = write_shards(folder, shards, progress, f"writing {target.name}")
        files = dict(written.files)
        _compare(opened, written)
        whole = dict(written.tensors)
        if opened.digests is None and opened.hub_files_id is None:
            whole |= _digests_of_rest(opened, names, progress)
        (folder / "config.json").write_text(
            json.dumps(dict(opened.config), indent=2) + "\n", encoding="utf-8"
        )
        if span.kind != "cloud":
            opened.write_side_files(folder)
        for path in sorted(folder.iterdir()):
            if path.name not in files:
                files[path.name] = FileDigest(path.stat().st_size, hash_file(path))
        weights, basis, tensors = _identity_of(opened, whole)
        Manifest(
            weights_id=weights,
            model_revision=model_revision(weights, opened.config),
            num_layers=layer_count(opened.config),
            dtype=stored_dtype([digest.dtype for digest in written.tensors.values()]),
            source=opened.label,
            part=span,
            tensors=tensors,
            files=files,
            weights_id_basis=basis,
        ).save(folder)


def write_prepared(target: Path, opened: Opened, span: PartSpan) -> None:
    """Write what `prepare` would for an opened source; the caller holds the lock of `target`. Errors as `prepare`."""
    _write(target, opened, span, MAX_SHARD_BYTES, None)


def _needed(opened: Opened, span: PartSpan) -> list[str]:
    """The names to store; all that the part needs must be there."""
    tied = bool(opened.config.get("tie_word_embeddings", HEAD not in opened.tensors))
    names = part_names(opened.tensors, span.kind, span.hi if span.kind == "device" else span.lo, tied)
    layers = {layer_of(name) for name in names}
    missing = [f"model.layers.{layer}.*" for layer in range(span.lo, span.hi) if layer not in layers]
    if span.kind != "cloud":
        missing += [end for end in ([EMBED, NORM] if tied else [EMBED, NORM, HEAD]) if end not in names]
    if missing:
        raise ModelError(f"{opened.label} holds no tensor {missing[0]}, which part {span.kind} needs")
    return names


def _compare(opened: Opened, written: Written) -> None:
    for name, digest in written.tensors.items():
        if opened.digests is not None and opened.digests.get(name) != digest:
            raise ModelError(
                f"{opened.label}: tensor {name} is not the one its manifest describes; fetch it again"
            )


def _digests_of_rest(
    opened: Opened, stored: Iterable[str], progress: Progress | None
) -> dict[str, TensorDigest]:
    """weights_id covers the whole model, also what this part does not store."""
    rest: list[SourceTensor] = [opened.tensors[name] for name in opened.tensors.keys() - set(stored)]
    total = sum(tensor.nbytes for tensor in rest)
    digests: dict[str, TensorDigest] = {}
    done = 0
    for tensor in sorted(rest, key=lambda tensor: tensor.name):
        digests[tensor.name] = digest_of(tensor)
        done += tensor.nbytes
        if progress:
            progress("checking the other part", done, total)
    return digests
