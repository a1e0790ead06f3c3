"""Which model a folder holds: what changes the ids, what does not, and what damage is found."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hat_runtime.errors import ModelError
from hat_runtime.model.ids import FileDigest, TensorDigest, hash_file, model_revision, weights_id
from hat_runtime.model.manifest import Manifest, PartSpan, identity, verify_files
from hat_runtime.model.weights import EMBED, NORM

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 3,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "torch_dtype": "float32",
    "transformers_version": "5.23.0",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A foreign model folder: two layers, float32, one file."""
    path = tmp_path / "model"
    path.mkdir()
    write_model(path, 1.0)
    return path


def write_model(path: Path, value: float, config: dict[str, object] | None = None) -> None:
    tensors = {
        name: torch.full((4, 3), value) for name in (EMBED, NORM, "model.layers.0.w", "model.layers.1.w")
    }
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config or CONFIG))


def prepared(path: Path) -> Manifest:
    """The folder's manifest with its files, as `hat model prepare` would write it."""
    found = identity(path)
    files = {
        name: FileDigest((path / name).stat().st_size, hash_file(path / name))
        for name in ("config.json", "model.safetensors")
    }
    return Manifest(**{**vars(found), "files": files})


def test_weights_id_is_the_documented_hash() -> None:
    tensors = {"b": TensorDigest("F32", (2, 3), "22"), "a": TensorDigest("BF16", (), "11")}
    assert weights_id(tensors) == hashlib.sha256(b"a BF16  11\nb F32 2x3 22\n").hexdigest()


def test_identity_of_a_foreign_folder(folder: Path) -> None:
    found = identity(folder)
    raw = torch.full((4, 3), 1.0).numpy().tobytes()
    assert found.tensors[EMBED] == TensorDigest("F32", (4, 3), hashlib.sha256(raw).hexdigest())
    assert (found.num_layers, found.dtype, found.part) == (2, "float32", PartSpan("all", 0, 2))
    assert found.model_revision == model_revision(found.weights_id, CONFIG)


def test_identity_does_not_depend_on_place_or_sharding(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    whole = {name: torch.full((4, 3), 1.0) for name in identity(folder).tensors}
    weight_map = {}
    for number, (name, tensor) in enumerate(whole.items()):
        weight_map[name] = f"{number}.safetensors"
        save_file({name: tensor}, other / weight_map[name])
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (other / "config.json").write_text(
        json.dumps({**CONFIG, "transformers_version": "6", "torch_dtype": "bfloat16"})
    )
    assert identity(other).model_revision == identity(folder).model_revision


def test_other_weights_or_rope_are_another_revision(folder: Path) -> None:
    first = identity(folder)
    (folder / "config.json").write_text(
        json.dumps({**CONFIG, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    )
    second = identity(folder)
    assert second.weights_id == first.weights_id
    assert second.model_revision != first.model_revision
    write_model(folder, 2.0)
    third = identity(folder)
    assert third.weights_id != first.weights_id
    assert third.model_revision != first.model_revision


def test_a_foreign_folder_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    first = identity(folder, lambda what, done, total: reads.append(done))
    assert reads
    assert reads[-1] == 4 * 48
    reads.clear()
    assert identity(folder, lambda what, done, total: reads.append(done)) == first
    assert not reads
    stat = (folder / "model.safetensors").stat()
    write_model(folder, 3.0)  # the same sizes
    os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert identity(folder).weights_id != first.weights_id


def test_a_damaged_or_unwritable_cache_only_costs_time(folder: Path, tmp_path: Path) -> None:
    first = identity(folder)
    (kept,) = (tmp_path / "cache" / "manifests").iterdir()
    kept.write_text("{")
    assert identity(folder) == first
    kept.unlink()
    kept.mkdir()
    assert identity(folder) == first


def test_saved_manifest_comes_back(folder: Path) -> None:
    manifest = prepared(folder)
    manifest.save(folder)
    assert Manifest.load(folder) == manifest
    assert identity(folder) == manifest


def test_a_missing_layer_is_named(folder: Path) -> None:
    write_model(folder, 1.0, {**CONFIG, "num_hidden_layers": 3})
    with pytest.raises(ModelError, match="no tensor of layer 2 of 3"):
        identity(folder)


def test_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no readable config\.json"):
        identity(folder)


def test_an_encoder_configuration_is_refused(folder: Path) -> None:
    write_model(folder, 1.0, {"model_type": "t5", "num_layers": 2})
    with pytest.raises(ModelError, match="num_hidden_layers is None"):
        identity(folder)


def test_changed_configuration_of_a_prepared_folder_is_found(folder: Path) -> None:
    prepared(folder).save(folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace("10000.0", "20000.0"))
    with pytest.raises(ModelError, match=r"config\.json was changed"):
        identity(folder)


def test_damage_is_found_and_named(folder: Path) -> None:
    prepared(folder).save(folder)
    path = folder / "model.safetensors"
    good = path.read_bytes()
    verify_files(folder, deep=True)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))  # one bit
    verify_files(folder)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged: its sha256"):
        verify_files(folder, deep=True)
    path.write_bytes(good[:-1])
    for check in (identity, verify_files):
        with pytest.raises(ModelError, match=rf"model\.safetensors is damaged: {len(good) - 1} bytes"):
            check(folder)
    path.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is missing"):
        verify_files(folder)


@pytest.mark.parametrize("change", [{"format": 9}, {"weights_id": "0" * 64}, {"part": 3}, {"tensors": None}])
def test_damaged_manifest_is_an_error_not_a_guess(folder: Path, change: dict[str, object]) -> None:
    manifest = prepared(folder)
    (folder / "hat_manifest.json").write_text(json.dumps({**manifest.to_json(), **change}))
    with pytest.raises(ModelError, match=r"hat_manifest\.json is damaged"):
        Manifest.load(folder)
