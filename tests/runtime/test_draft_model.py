"""A draft model out of its target and one trained layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hat_runtime.cli.main import main
from hat_runtime.errors import ModelError, UsageError
from hat_runtime.model.draft_model import build_draft_model, prepare_draft_model, shipped_draft_model
from hat_runtime.model.manifest import identity, verify_files
from hat_runtime.model.prepare import prepare
from hat_runtime.model.tokenizer_id import tokenizer_id
from tests.runtime.picospec_pair import Whole, picospec
from tests.tiny_chat import make_tiny_chat_model


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("draft") / "target")


def trained_layer(target: Path, out: Path, layer: int = 5) -> Path:
    """As training leaves it: here the target's own last layer."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    tensors = {name: tensor.clone() for name, tensor in model.model.layers[layer].state_dict().items()}
    tensors["norm.weight"] = model.model.norm.weight.detach() * 2
    save_file(tensors, out)
    return out


async def test_a_built_draft_model_is_the_targets_beginning_and_the_layer(
    target: Path, tmp_path: Path
) -> None:
    layer_file = trained_layer(target, tmp_path / "layer.safetensors")
    folder = build_draft_model(target, layer_file, tmp_path / "draft")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert len(model.model.layers) == 4
    for mine, theirs in zip(model.model.layers, [0, 1, 2, 5], strict=True):
        want = whole.model.layers[theirs].state_dict()
        assert all(torch.equal(tensor, want[name]) for name, tensor in mine.state_dict().items())
    assert torch.equal(model.lm_head.weight, whole.model.embed_tokens.weight)
    assert torch.equal(model.model.norm.weight, whole.model.norm.weight * 2)
    assert tokenizer_id(folder) == tokenizer_id(target) != ""
    assert identity(folder).weights_id != identity(target).weights_id

    written = (folder / "hat_manifest.json").stat().st_mtime_ns
    build_draft_model(target, layer_file, folder)
    assert (folder / "hat_manifest.json").stat().st_mtime_ns == written

    from hat_runtime.device.generator import GenerationRequest

    prompt = [5, 9, 44, 102, 7, 31]
    async with picospec(target, folder) as (generator, _):
        got = [event.token_id async for event in generator.generate(GenerationRequest(prompt, 12))]
    assert got == Whole(target).decode(prompt, 12)


def test_what_cannot_be_built(target: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    good = trained_layer(target, tmp_path / "layer.safetensors")
    with pytest.raises(ModelError, match="model_type 'qwen3'"):
        build_draft_model(tiny_models["qwen3"], good, tmp_path / "out")
    with pytest.raises(ModelError, match="has 6 layers, 6 are taken over"):
        build_draft_model(target, good, tmp_path / "out", layers_of_target=6)
    bad = tmp_path / "bad.safetensors"
    save_file({"norm.weight": torch.zeros(64)}, bad)
    with pytest.raises(ModelError, match="lacks the tensor"):
        build_draft_model(target, bad, tmp_path / "out")
    save_file({**_layer(good), "norm.weight": torch.zeros(32)}, bad)
    with pytest.raises(ModelError, match=r"norm.weight is \[32\], the target's is \[64\]"):
        build_draft_model(target, bad, tmp_path / "out")
    save_file({**_layer(good), "more.weight": torch.zeros(3)}, bad)
    with pytest.raises(ModelError, match="more"):
        build_draft_model(target, bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="--draft-model is needed"):
        shipped_draft_model(target)


@pytest.mark.default_model
def test_the_draft_model_of_the_default_model_as_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `--part draft` writes is what a device would build on first use; a whole model there is replaced by it."""
    out = prepare("default", tmp_path / "draft")
    assert main(["model", "prepare", "default", "--part", "draft", "--out", str(out)]) == 0
    assert f"{out}: draft of " in capsys.readouterr().out
    written = verify_files(out, deep=True)
    assert (written.num_layers, written.part.kind) == (4, "all")
    assert written.weights_id == identity(shipped_draft_model(prepare("default"))).weights_id
    assert tokenizer_id(out) == tokenizer_id(prepare("default")) != ""


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["org/model"], "no draft model comes with HAT for org/model"),
        (["default", "--input-layers", "3"], "--input-layers 3 does not go with --part draft"),
        (["default", "--dtype", "float32"], "--dtype float32 does not go with --part draft"),
    ],
    ids=["hub", "layers", "dtype"],
)
def test_no_draft_model_to_prepare(more: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "prepare", *more, "--part", "draft"]) == 2
    assert words in capsys.readouterr().err


def test_no_draft_model_comes_for_a_folder(target: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no draft model comes with HAT for"):
        prepare_draft_model(str(target), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _layer(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(file))


def test_a_vocabulary_is_told_by_its_tokens(target: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    text = (target / "tokenizer.json").read_text()
    path.write_text(text.replace("▁", " "))
    assert tokenizer_id(tmp_path) != tokenizer_id(target)
    path.write_text(text.replace('"post_processor"', '"postprocessor"'))
    assert tokenizer_id(tmp_path) == tokenizer_id(target)
    path.write_text("{}")
    with pytest.raises(ModelError, match="damaged"):
        tokenizer_id(tmp_path)
    path.unlink()
    assert tokenizer_id(tmp_path) == ""
