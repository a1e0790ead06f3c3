"""hat_manifest.json: which model a folder holds, so that device and cloud can tell whether theirs are the same.

It describes the whole model, whatever part of it the folder stores; see ids.py for the two ids.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hat_runtime.errors import ModelError
from hat_runtime.model.cache import cache_dir, lock
from hat_runtime.model.ids import (
    FileDigest,
    TensorDigest,
    hash_file,
    model_revision,
    stored_dtype,
    weights_id,
)
from hat_runtime.model.weights import Part, TensorIndex, layer_of

MANIFEST_FILE = "hat_manifest.json"
FORMAT = 1
BY_TENSORS = "tensors"
BY_HUB_FILES = "hub files"


Progress = Callable[[str, int, int], None]
"""progress(what, done, total): called while bytes are read, fetched or written."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartSpan:
    """What a folder stores: decoder layers lo..hi-1 and, unless the kind is "cloud", embedding, norm and head."""

    kind: Part
    lo: int
    hi: int


@dataclass(frozen=True)
class Manifest:
    """The identity of a model and what of it a folder stores."""

    weights_id: str
    model_revision: str
    num_layers: int
    dtype: str
    """Of the stored weights: "float32", "bfloat16", ..."""
    source: str
    part: PartSpan
    tensors: Mapping[str, TensorDigest] = field(repr=False)
    """Of the whole model; empty where weights_id comes from the hub's file list."""
    files: Mapping[str, FileDigest] = field(repr=False)
    """Of this folder; empty for a folder that HAT did not write."""
    weights_id_basis: str = BY_TENSORS

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Read folder/hat_manifest.json.

        Raises:
            ModelError: missing, unreadable, of another format, or at odds with itself.
        """
        path = folder / MANIFEST_FILE
        try:
            manifest = _from_json(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{path} is damaged ({type(error).__name__}: {error}); prepare the model again"
            ) from error
        if manifest.weights_id_basis == BY_TENSORS and manifest.weights_id != weights_id(manifest.tensors):
            raise ModelError(
                f"{path} is damaged: weights_id does not match its tensors; prepare the model again"
            )
        return manifest

    def to_json(self) -> dict[str, Any]:
        """The content of hat_manifest.json."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, folder: Path) -> None:
        """Write folder/hat_manifest.json."""
        text = json.dumps(self.to_json(), indent=1, sort_keys=True)
        (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        ModelError: missing or no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{folder} holds no readable config.json ({error.strerror}); is it a model folder?"
        ) from error
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is damaged: it holds no JSON object")
    return config


def layer_count(config: Mapping[str, Any]) -> int:
    """num_hidden_layers of a configuration.

    Raises:
        ModelError: there is no such number.
    """
    count = config.get("num_hidden_layers")
    if not isinstance(count, int) or count < 1:
        raise ModelError(
            f"config.json: num_hidden_layers is {count!r}; only decoder-only models are supported"
        )
    return count


def identity(folder: Path, progress: Progress | None = None) -> Manifest:
    """Which model `folder` holds.

    Reads hat_manifest.json where there is one (and checks file sizes and the configuration against it). A foreign
    folder is hashed whole, once; the result is cached by the files' sizes and times.

    Raises:
        ModelError: no usable model in the folder, or it changed since it was prepared.
    """
    config = read_config(folder)
    if (folder / MANIFEST_FILE).is_file():
        manifest = Manifest.load(folder)
        check_files(folder, manifest)
        if manifest.model_revision != model_revision(manifest.weights_id, config):
            raise ModelError(
                f"{folder / 'config.json'} was changed after `hat model prepare`; prepare the model again"
            )
        return manifest
    index = TensorIndex(folder)
    kept = (
        cache_dir()
        / "manifests"
        / (hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32] + ".json")
    )
    with lock(kept):
        stamp = _stamp(folder, index)
        found = _read_kept(kept, stamp)
        if found is None:
            found = hash_folder(folder, index, config, progress)
            _keep(kept, stamp, found)
    return found


def hash_folder(
    folder: Path, index: TensorIndex, config: Mapping[str, Any], progress: Progress | None = None
) -> Manifest:
    """The manifest of a whole foreign folder, from reading every tensor once.

    Raises:
        ModelError: a shard is missing or damaged, or a layer is not there.
    """
    layers = layer_count(config)
    missing = sorted(set(range(layers)) - {layer_of(name) for name in index.names})
    if missing:
        raise ModelError(
            f"{folder} holds no tensor of layer {missing[0]} of {layers} (model.layers.{missing[0]}.*)"
        )
    total = sum(index.info(name).nbytes for name in index.names)
    done = 0
    tensors: dict[str, TensorDigest] = {}
    for name in index.names:
        info = index.info(name)
        digest = hashlib.sha256()
        for piece in index.read(name):
            digest.update(piece)
            done += len(piece)
            if progress:
                progress("checking weights", done, total)
        tensors[name] = TensorDigest(info.dtype, info.shape, digest.hexdigest())
    weights = weights_id(tensors)
    return Manifest(
        weights_id=weights,
        model_revision=model_revision(weights, config),
        num_layers=layers,
        dtype=stored_dtype([digest.dtype for digest in tensors.values()]),
        source=folder.name,
        part=PartSpan("all", 0, layers),
        tensors=tensors,
        files={},
    )


def verify_files(folder: Path, deep: bool = False, progress: Progress | None = None) -> Manifest:
    """Check a prepared folder's files against its manifest: sizes, and with `deep` also sha256.

    Raises:
        ModelError: names the first file that is missing or damaged.
    """
    manifest = Manifest.load(folder)
    check_files(folder, manifest)
    if deep:
        total = sum(digest.size for digest in manifest.files.values())
        done = 0
        for name, expected in manifest.files.items():
            if hash_file(folder / name) != expected.sha256:
                raise ModelError(
                    f"{folder / name} is damaged: its sha256 is not the manifest's; prepare the model again"
                )
            done += expected.size
            if progress:
                progress("checking files", done, total)
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare the sizes of a folder's files with its manifest.

    Raises:
        ModelError: names the first file that is missing or has another size.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ModelError(f"{path} is missing ({error.strerror}); prepare the model again") from error
        if size != expected.size:
            raise ModelError(
                f"{path} is damaged: {size} bytes instead of {expected.size}; prepare the model again"
            )


def _from_json(data: dict[str, Any]) -> Manifest:
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']!r}, this version reads {FORMAT}")
    return Manifest(
        weights_id=data["weights_id"],
        model_revision=data["model_revision"],
        num_layers=int(data["num_layers"]),
        dtype=data["dtype"],
        source=data["source"],
        part=PartSpan(**data["part"]),
        tensors={
            name: TensorDigest(entry["dtype"], tuple(entry["shape"]), entry["sha256"])
            for name, entry in data["tensors"].items()
        },
        files={name: FileDigest(**entry) for name, entry in data["files"].items()},
        weights_id_basis=data["weights_id_basis"],
    )


def _stamp(folder: Path, index: TensorIndex) -> list[list[Any]]:
    stamp: list[list[Any]] = []
    for name in ["config.json", *index.shards]:
        try:
            stat = (folder / name).stat()
        except OSError as error:
            raise ModelError(
                f"the shard {folder / name} is missing ({error.strerror}); fetch the model again"
            ) from error
        stamp.append([name, stat.st_size, stat.st_mtime_ns])
    return stamp


def _read_kept(path: Path, stamp: list[list[Any]]) -> Manifest | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return _from_json(kept["manifest"]) if kept["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _keep(path: Path, stamp: list[list[Any]], manifest: Manifest) -> None:
    """Best effort: without the cached file the folder is hashed again next time, nothing else."""
    new = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps({"stamp": stamp, "manifest": manifest.to_json()}), encoding="utf-8")
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        log.warning("cannot keep the model's identity in %s: %s", path, error.strerror)
