"""A draft model out of its target: embedding, first layers, one trained layer, final norm and head.

The first layers are the target's own, so that one layer is all that has to be trained and shipped: it learns to stand
in for the target's other layers. The result is a folder like any other model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from hat_runtime.errors import ModelError, UsageError
from hat_runtime.model.cache import lock, models_dir
from hat_runtime.model.manifest import Progress, identity, layer_count
from hat_runtime.model.prepare import prepare, span_of, write_prepared
from hat_runtime.model.shards import SourceTensor
from hat_runtime.model.sources import Opened, converted, kind_of, open_folder
from hat_runtime.model.weights import EMBED, HEAD, NORM, TensorInfo, layer_of, read_header

LAYERS_OF_TARGET = 3
TRAINED_NORM = "norm.weight"
SHIPPED = Path(__file__).resolve().parent / "drafts"
"""Trained layers that come with HAT, named by their target's weights_id."""


def prepare_draft_model(source: str, out: Path | None = None, progress: Progress | None = None) -> Path:
    """The draft model that comes with HAT for a model, as a folder: what a device of token mode needs.

    Args:
        source: the target: "default", a folder or a .gguf file.
        out: as `shipped_draft_model`.
        progress: of preparing the target.

    Raises:
        UsageError: no draft model comes with HAT for it, or `out` holds something that HAT did not write.
        ModelError: the source cannot be used.
        HatError: no space, no network, no right to write.
    """
    kind = kind_of(source)
    if kind == "hub":
        raise UsageError(
            f"--part draft: no draft model comes with HAT for {source}; prepare a small model whole"
        )
    target = Path(source).expanduser() if kind == "folder" else prepare(source, progress=progress)
    return shipped_draft_model(target, out)


def shipped_draft_model(target: Path, out: Path | None = None) -> Path:
    """The draft model for a target that HAT has a trained layer for; built on first use.

    Args:
        target: the whole model's folder.
        out: default: a folder of the cache.

    Raises:
        UsageError: there is no trained layer for it.
    """
    weights = identity(target).weights_id
    layer_file = SHIPPED / f"{weights[:16]}.safetensors"
    if not layer_file.is_file():
        raise UsageError(
            f"--draft-model is needed: no draft model comes with HAT for {target} (weights_id {weights[:16]})"
        )
    return build_draft_model(target, layer_file, out or models_dir() / f"draft-{weights[:16]}")


def build_draft_model(
    target: Path, layer_file: Path, out: Path, layers_of_target: int = LAYERS_OF_TARGET
) -> Path:
    """Write the draft model's folder, with manifest and tokenizer; returns it. One that is there is kept.

    Args:
        target: a whole model of the llama kind, as `hat model prepare` writes it.
        layer_file: safetensors with one decoder layer ("self_attn.q_proj.weight", ...) and "norm.weight".
        out: the folder.
        layers_of_target: the target's first layers that are taken over.

    Raises:
        ModelError: the target or the layer file cannot be used, or their shapes differ.
        UsageError: `out` holds something that HAT did not write.
        HatError: no space, or no right to write.
    """
    opened = open_folder(target, None)
    if opened.config.get("model_type") != "llama":
        raise ModelError(
            f"{target}: model_type {opened.config.get('model_type')!r}; only llama can be cut so"
        )
    if layer_count(opened.config) <= layers_of_target:
        raise ModelError(
            f"{target} has {layer_count(opened.config)} layers, {layers_of_target} are taken over"
        )
    tensors = dict(_tensors(opened, target, layer_file, layers_of_target))
    draft = replace(
        opened,
        label=f"draft of {opened.label}",
        config={**opened.config, "num_hidden_layers": layers_of_target + 1},
        tensors=tensors,
        digests=None,
    )
    with lock(out):
        if not (out.exists() and _is_already(out, draft.label, layer_file)):
            write_prepared(out, draft, span_of("all", 0, layers_of_target + 1))
    return out


def _is_already(out: Path, label: str, layer_file: Path) -> bool:
    try:
        if identity(out).source != label:
            return False
    except ModelError:
        return False
    return out.stat().st_mtime >= layer_file.stat().st_mtime


def _tensors(
    opened: Opened, target: Path, layer_file: Path, count: int
) -> Iterator[tuple[str, SourceTensor]]:
    trained = read_header(layer_file)
    like = {
        name.removeprefix("model.layers.0."): opened.tensors[name]
        for name in opened.tensors
        if layer_of(name) == 0
    }
    wanted = {name: tensor.shape for name, tensor in like.items()} | {
        TRAINED_NORM: opened.tensors[NORM].shape
    }
    _check(trained, wanted, layer_file)
    for name in opened.tensors:
        layer = layer_of(name)
        if name in (EMBED, HEAD) or (layer is not None and layer < count):
            yield name, opened.tensors[name]
    dtype = "float32" if opened.tensors[EMBED].dtype == "F32" else "bfloat16"
    for name, info in trained.items():
        place = NORM if name == TRAINED_NORM else f"model.layers.{count}.{name}"
        stored = SourceTensor(place, info.dtype, info.shape, partial(_read, layer_file, info))
        yield place, converted(stored, dtype)


def _check(
    trained: Mapping[str, TensorInfo], wanted: Mapping[str, tuple[int, ...]], layer_file: Path
) -> None:
    for name, shape in wanted.items():
        if name not in trained:
            raise ModelError(f"{layer_file} lacks the tensor {name!r}")
        if trained[name].shape != shape:
            raise ModelError(
                f"{layer_file}: {name} is {list(trained[name].shape)}, the target's is {list(shape)}"
            )
    if extra := sorted(trained.keys() - wanted.keys()):
        raise ModelError(f"{layer_file} holds {extra[0]!r}, which is no tensor of a layer of the target")


def _read(path: Path, info: TensorInfo) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(info.offset)
        yield file.read(info.nbytes)
