"""Reading a folder of safetensors by headers: names, places, parts, and what a damaged folder says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hat_runtime.errors import ModelError
from hat_runtime.model.weights import EMBED, HEAD, NORM, TensorIndex, layer_of, part_names, read_header

NAMES = [EMBED, NORM, HEAD] + [f"model.layers.{i}.mlp.up_proj.weight" for i in range(12)]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Twelve layers, one shard each, and a shard for the ends; bfloat16."""
    weight_map = {}
    for name in NAMES:
        layer = layer_of(name)
        weight_map[name] = "ends.safetensors" if layer is None else f"layer-{layer:02}.safetensors"
    for shard in set(weight_map.values()):
        tensors = {
            name: torch.full((2, 3), float(NAMES.index(name)), dtype=torch.bfloat16)
            for name in NAMES
            if weight_map[name] == shard
        }
        save_file(tensors, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_layer_of_reads_the_number_and_nothing_else() -> None:
    assert layer_of("model.layers.10.self_attn.q_proj.weight") == 10
    assert layer_of("model.layers.1.x") == 1
    assert layer_of(EMBED) is None
    assert layer_of("visual.model.layers.3.x") is None


def test_parts_cover_the_model_once() -> None:
    device = part_names(NAMES, "device", 3, tied=False)
    cloud = part_names(NAMES, "cloud", 3, tied=False)
    assert sorted(device + cloud) == sorted(NAMES)
    assert set(device) == {EMBED, NORM, HEAD, *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3))}
    assert HEAD not in part_names(NAMES, "device", 3, tied=True)
    assert part_names(NAMES, "all", 3, tied=True) == NAMES


def test_only_the_shards_of_a_part_are_opened(sharded: Path) -> None:
    (sharded / "layer-07.safetensors").write_bytes(b"garbage")
    (sharded / "layer-08.safetensors").unlink()
    wanted = set(part_names(NAMES, "device", 3, tied=False))
    slices = TensorIndex(sharded).select(wanted.__contains__)
    assert slices.keys() == wanted
    for name, lazy in slices.items():
        assert torch.equal(lazy[:], torch.full((2, 3), float(NAMES.index(name)), dtype=torch.bfloat16))


def test_info_and_raw_bytes(sharded: Path) -> None:
    index = TensorIndex(sharded)
    name = "model.layers.5.mlp.up_proj.weight"
    info = index.info(name)
    assert (info.dtype, info.shape, info.shard, info.nbytes) == ("BF16", (2, 3), "layer-05.safetensors", 12)
    raw = b"".join(index.read(name))
    assert torch.equal(
        torch.frombuffer(bytearray(raw), dtype=torch.bfloat16),
        torch.full((6,), float(NAMES.index(name))).bfloat16(),
    )


def test_single_file(tmp_path: Path) -> None:
    save_file({EMBED: torch.ones(4, 2)}, tmp_path / "model.safetensors")
    index = TensorIndex(tmp_path)
    assert index.names == [EMBED]
    assert index.info(EMBED).shape == (4, 2)


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "layer-08.safetensors").unlink()
    with pytest.raises(ModelError, match=r"shard .*layer-08\.safetensors is missing"):
        TensorIndex(sharded).select(lambda name: layer_of(name) == 8)


def test_tensor_that_the_index_promises_but_the_shard_lacks(sharded: Path) -> None:
    save_file({"other": torch.ones(1)}, sharded / "layer-08.safetensors")
    with pytest.raises(ModelError, match=r"layer-08\.safetensors lacks the tensor 'model\.layers\.8\."):
        TensorIndex(sharded).select(lambda name: layer_of(name) == 8)


@pytest.mark.parametrize("damage", ["cut", "grown", "empty", "text"])
def test_damaged_shard_is_named(sharded: Path, damage: str) -> None:
    path = sharded / "ends.safetensors"
    data = path.read_bytes()
    path.write_bytes(
        {"cut": data[:-1], "grown": data + b"x", "empty": b"", "text": b"version https://git-lfs..."}[damage]
    )
    with pytest.raises(ModelError, match=re.escape(str(path))):
        read_header(path)


def test_pickle_only_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pickle weights \(pytorch_model\.bin\)"):
        TensorIndex(tmp_path)


def test_folder_without_weights_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds neither"):
        TensorIndex(tmp_path)
    with pytest.raises(ModelError, match="no folder"):
        TensorIndex(tmp_path / "absent")


@pytest.mark.parametrize("shard", ["../ends.safetensors", "/etc/passwd", 3])
def test_index_cannot_lead_outside_its_folder(sharded: Path, shard: object) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {EMBED: shard}}))
    with pytest.raises(ModelError, match="no plain file name"):
        TensorIndex(sharded)
