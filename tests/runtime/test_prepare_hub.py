"""Fetching from a hub: only what a part needs crosses the wire, and every part has the same identity."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from hat_runtime.errors import ModelError
from hat_runtime.model.manifest import identity
from hat_runtime.model.prepare import prepare
from hat_runtime.model.weights import TensorIndex, layer_of, part_names
from tests.hub import COMMIT, Hub, running_hub

REPO = "people/tiny"


@pytest.fixture
def hub(tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one repository, and an empty hub cache."""
    served = tmp_path / "served"
    shutil.copytree(tiny_models["qwen3"], served)
    (served / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("HAT_CACHE", str(tmp_path / "cache"))
    # huggingface_hub reads its environment at import, which other tests have caused already.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running_hub(Hub({REPO: served})) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield running


def test_a_part_fetches_only_its_shards(hub: Hub, tmp_path: Path) -> None:
    index = TensorIndex(hub.repos[REPO])
    cloud = prepare(REPO, tmp_path / "cloud", "cloud", 4)
    wanted = set(index.shards_of(part_names(index.names, "cloud", 4, tied=False)))
    fetched = hub.fetched()
    assert {name for name in fetched if name.endswith(".safetensors")} == wanted < set(index.shards)
    assert "tokenizer.json" not in fetched
    assert {layer_of(name) for name in TensorIndex(cloud).names} == {4, 5}

    hub.requests.clear()
    device = prepare(REPO, tmp_path / "device", "device", 1)
    assert "tokenizer.json" in hub.fetched()
    assert set(index.shards) - hub.fetched() - wanted, "some layers are in neither part's shards"

    whole = prepare(REPO, tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(whole)
    assert len({identity(folder).model_revision for folder in (cloud, device, whole)}) == 1
    converted = prepare(REPO, tmp_path / "converted", "cloud", 4, dtype="bfloat16")
    assert identity(converted).weights_id != identity(cloud).weights_id


def test_other_weights_on_the_hub_are_another_model(hub: Hub, tmp_path: Path) -> None:
    first = identity(prepare(REPO, tmp_path / "a", "cloud", 4))
    shard = next(iter(TensorIndex(hub.repos[REPO]).shards_of(["model.layers.0.mlp.up_proj.weight"])))
    path = hub.repos[REPO] / shard  # one that this part does not fetch
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert identity(prepare(REPO, tmp_path / "b", "cloud", 4)).weights_id != first.weights_id


def test_a_repository_with_our_manifest_keeps_its_identity(hub: Hub, tmp_path: Path) -> None:
    local = prepare(str(hub.repos[REPO]), tmp_path / "local")
    hub.repos[REPO] = local
    device = prepare(REPO, tmp_path / "device", "device", 2)
    assert identity(device).model_revision == identity(local).model_revision


def test_the_second_call_fetches_no_content(hub: Hub) -> None:
    out = prepare(REPO, part="device", input_layers=2)
    hub.requests.clear()
    assert prepare(f"{REPO}", part="device", input_layers=2) == out
    assert hub.fetched() == set()


def test_offline_uses_what_was_fetched_and_says_what_is_missing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = prepare(REPO, tmp_path / "a", "device", 2)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = prepare(REPO, tmp_path / "b", "device", 2)
    assert identity(offline).model_revision == identity(online).model_revision
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE is set; unset it once"):
        prepare(REPO, tmp_path / "c")
    with pytest.raises(ModelError, match=r"people/other .*HF_HUB_OFFLINE"):
        prepare("people/other", tmp_path / "c")
    assert hub.requests == []


def test_revisions(hub: Hub, tmp_path: Path) -> None:
    assert identity(prepare(f"{REPO}@{COMMIT}", tmp_path / "a", "cloud", 5)).source == f"{REPO}@{COMMIT}"
    with pytest.raises(ModelError, match="not this revision"):
        prepare(f"{REPO}@no-such-branch", tmp_path / "b")


def test_not_found_and_gated_say_what_to_do(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"people/absent was not found at .*HF_TOKEN"):
        prepare("people/absent", tmp_path / "out")
    hub.gated.add(REPO)
    with pytest.raises(ModelError, match=r"is gated: accept its terms .* HF_TOKEN"):
        prepare(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", hub.token)
    prepare(REPO, tmp_path / "out")


def test_an_unreachable_hub_is_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"http://127\.0\.0\.1:9 cannot be reached.*HF_ENDPOINT"):
        prepare(REPO, tmp_path / "out")


def test_pickle_only_repositories_are_refused(hub: Hub, tmp_path: Path) -> None:
    for path in hub.repos[REPO].glob("*.safetensors*"):
        path.unlink()
    (hub.repos[REPO] / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"only pickle weights \(pytorch_model\.bin\)"):
        prepare(REPO, tmp_path / "out")
    assert "pytorch_model.bin" not in hub.fetched()
