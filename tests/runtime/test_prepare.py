"""`hat model prepare`: a folder that loads by parts, loads whole, and is identified the same everywhere."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hat_runtime.cli.model import COMMAND
from hat_runtime.errors import HatError, ModelError, UsageError
from hat_runtime.model.manifest import MANIFEST_FILE, Manifest, identity, verify_files
from hat_runtime.model.prepare import prepare
from hat_runtime.model.shards import SourceTensor, plan_shards
from hat_runtime.model.weights import EMBED, HEAD, NORM, TensorIndex, layer_of
from tests.tiny_models import ARCHITECTURES


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of tiny qwen3 (untied head) with files as tokenizers have them."""
    folder = tmp_path_factory.mktemp("source") / "qwen3"
    shutil.copytree(tiny_models["qwen3"], folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("x")
    return folder


def logits(folder: Path) -> torch.Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        found: torch.Tensor = loaded(torch.arange(9).view(1, 9)).logits
    return found


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if ".new-" in path.name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_model_loads_with_plain_transformers(
    tiny_models: dict[str, Path], architecture: str, tmp_path: Path
) -> None:
    source = tiny_models[architecture]
    out = prepare(str(source), tmp_path / "out")
    assert torch.equal(logits(out), logits(source))
    assert verify_files(out, deep=True).weights_id == identity(source).weights_id
    assert identity(out).model_revision == identity(source).model_revision


def test_parts_hold_what_their_side_needs_and_share_one_identity(model: Path, tmp_path: Path) -> None:
    whole = prepare(str(model), tmp_path / "whole")
    device = prepare(str(model), tmp_path / "device", "device", 2)
    cloud = prepare(str(whole), tmp_path / "cloud", "cloud", 2)  # from a prepared folder as well
    assert {layer_of(name) for name in TensorIndex(device).names} == {None, 0, 1}
    assert {name for name in TensorIndex(device).names if layer_of(name) is None} == {EMBED, NORM, HEAD}
    assert {layer_of(name) for name in TensorIndex(cloud).names} == {2, 3, 4, 5}
    manifests = [identity(folder) for folder in (whole, device, cloud, model)]
    assert len({manifest.model_revision for manifest in manifests}) == 1
    assert [(m.part.kind, m.part.lo, m.part.hi) for m in manifests[:3]] == [
        ("all", 0, 6),
        ("device", 0, 2),
        ("cloud", 2, 6),
    ]
    assert (device / "tokenizer.json").is_file()
    assert (device / "generation_config.json").is_file()
    assert not (cloud / "tokenizer.json").exists()
    sizes = [
        sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (whole, device, cloud)
    ]
    assert sizes[1] + sizes[2] < 1.1 * sizes[0]


def test_a_tied_head_is_stored_once(tiny_llama: Path, tmp_path: Path) -> None:
    device = prepare(str(tiny_llama), tmp_path / "device", "device", 1)
    assert HEAD not in TensorIndex(device).names


def test_conversion_rounds_like_torch_and_is_another_model(model: Path, tmp_path: Path) -> None:
    out = prepare(str(model), tmp_path / "out", dtype="bfloat16")
    device = prepare(str(model), tmp_path / "device", "device", 2, dtype="bfloat16")
    name = "model.layers.1.mlp.up_proj.weight"
    stored = TensorIndex(model).select(name.__eq__)[name][:]
    for folder in (out, device):
        assert torch.equal(TensorIndex(folder).select(name.__eq__)[name][:], stored.bfloat16())
    assert identity(device).model_revision == identity(out).model_revision != identity(model).model_revision
    assert identity(out).dtype == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_shards_follow_layers() -> None:
    def tensor(name: str) -> SourceTensor:
        return SourceTensor(name, "F32", (25,), lambda: iter([bytes(100)]))

    names = [EMBED, NORM, HEAD] + [f"model.layers.{i}.{part}" for i in range(12) for part in "ab"]
    shards = [[t.name for t in shard] for shard in plan_shards(map(tensor, names), 500)]
    assert shards[0] == [EMBED, NORM, HEAD]
    assert [{layer_of(name) for name in shard} for shard in shards[1:]] == [
        {i, i + 1} for i in range(0, 12, 2)
    ]
    assert [len(shard) for shard in plan_shards(map(tensor, names), 100)] == [1] * 27


def test_second_call_keeps_a_sound_folder_and_mends_a_damaged_one(model: Path, tmp_path: Path) -> None:
    out = prepare(str(model), tmp_path / "out")
    (shard, *_) = sorted(out.glob("*.safetensors"))
    before = shard.stat().st_ino
    prepare(str(model), out)
    assert shard.stat().st_ino == before
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ModelError, match=shard.name):
        verify_files(out, deep=True)
    prepare(str(model), out)
    verify_files(out, deep=True)
    prepare(str(model), out, dtype="bfloat16")  # another conversion replaces it
    assert identity(out).dtype == "bfloat16"
    assert leftovers(tmp_path) == []


def test_a_cached_folder_that_lost_its_manifest_is_prepared_again(model: Path, cache: Path) -> None:
    out = prepare(str(model))
    assert out.parent == cache / "models-2"
    (out / MANIFEST_FILE).unlink()
    assert prepare(str(model)) == out
    verify_files(out, deep=True)


def test_nothing_foreign_is_written_over(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "holiday"
    out.mkdir()
    (out / "photo.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"holiday is not empty and was not written by hat"):
        prepare(str(model), out)
    assert [path.name for path in out.iterdir()] == ["photo.jpg"]
    with pytest.raises(UsageError, match="source itself"):
        prepare(str(prepare(str(model), tmp_path / "a")), tmp_path / "a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"part": "device"}, "--part device needs --input-layers"),
        ({"input_layers": 3}, "--input-layers goes with --part"),
        ({"part": "cloud", "input_layers": 6}, "--input-layers 6: .* write 1 to 5"),
        ({"part": "device", "input_layers": 0}, "--input-layers 0"),
    ],
)
def test_wrong_arguments_name_the_option(
    model: Path, tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(str(model), tmp_path / "out", **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["no/such/folder", "./nothing", "absent.gguf", "name", ""])
def test_unknown_sources_are_told_apart_from_hub_ids(source: str) -> None:
    with pytest.raises(UsageError):
        prepare(source)


def test_damaged_sources_are_named(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model, source)
    (shard,) = TensorIndex(source).shards_of(["model.layers.4.mlp.up_proj.weight"])
    (source / shard).unlink()
    with pytest.raises(ModelError, match=rf"{shard} is missing"):
        prepare(str(source), tmp_path / "out")
    (source / "model.safetensors.index.json").unlink()
    for path in source.glob("*.safetensors"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="pickle weights"):
        prepare(str(source), tmp_path / "out")
    (source / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        prepare(str(source), tmp_path / "out")
    for content in (b"", b"GGUF no more", b"GGUF" + bytes(100), b"PK" * 50):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(ModelError, match=r"x\.gguf as GGUF"):
            prepare(str(tmp_path / "x.gguf"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []


def test_a_part_cannot_be_made_from_another_part(model: Path, tmp_path: Path) -> None:
    device = prepare(str(model), tmp_path / "device", "device", 2)
    assert identity(prepare(str(device), tmp_path / "smaller", "device", 1)).part.hi == 1
    with pytest.raises(ModelError, match=r"holds no tensor model\.layers\.2\.\*"):
        prepare(str(device), tmp_path / "cloud", "cloud", 2)


def test_two_at_once_write_one_folder(model: Path, tmp_path: Path) -> None:
    out, failures = tmp_path / "out", []

    def work() -> None:
        try:
            prepare(str(model), out)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    verify_files(out, deep=True)
    assert leftovers(tmp_path) == []


def test_too_little_space_is_said_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1000))
    with pytest.raises(HatError, match=r"no space for .*out: [\d,]+ bytes needed, 1,000 free"):
        prepare(str(model), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


_ON_A_FULL_DISK = """
import shutil, sys, os
from pathlib import Path
real = shutil.disk_usage
shutil.disk_usage = lambda path: real(path)._replace(free=1 << 40)  # the space goes away after the check
from hat_runtime.errors import HatError
from hat_runtime.model.prepare import prepare
small = Path(sys.argv[2])
try:
    prepare(sys.argv[1], small / "out")
except HatError as error:
    print(error)
print(sorted(os.listdir(small)))
"""


def test_a_disk_that_fills_up_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    """On a real, full file system, where the machine allows to mount one."""
    small = tmp_path / "small"
    small.mkdir()
    script = tmp_path / "script.py"
    script.write_text(_ON_A_FULL_DISK)
    mount = (
        f"mount -t tmpfs -o size=200k hat {small} || exit 77; exec {sys.executable} {script} {model} {small}"
    )
    try:
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", mount], capture_output=True, text=True, check=False, cwd=Path.cwd()
        )
    except FileNotFoundError:
        pytest.skip("no unshare command")
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    assert f"no space for {small}/out: " in done.stdout
    assert "bytes needed" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_ctrl_c_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom hat_runtime.model.prepare import prepare\n"
        "def slow(what, done, total):\n    print(what, flush=True); time.sleep(0.2)\n"
        "prepare(sys.argv[1], Path(sys.argv[2]), progress=slow)\n"
    )
    out = tmp_path / "place" / "out"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(model), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("writing")
        assert leftovers(out.parent)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
    assert list(out.parent.iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next(model: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.new-dead").mkdir()
    (tmp_path / ".out.new-dead" / "half.safetensors").write_bytes(b"x")
    prepare(str(model), tmp_path / "out")
    assert leftovers(tmp_path) == []


def run_hat_model(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    COMMAND.configure(parser)
    args = parser.parse_args(arguments)
    return int(args.run(args))


def test_the_command_prints_the_identity_as_json(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert (
        run_hat_model(
            "prepare", str(model), "--out", str(out), "--part", "cloud", "--input-layers", "2", "--json"
        )
        == 0
    )
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    manifest = Manifest.load(out)
    assert facts["model_revision"] == manifest.model_revision
    assert facts["part"] == {"kind": "cloud", "lo": 2, "hi": 6}
    assert "writing out: 100 %" in printed.err
    assert run_hat_model("verify", str(out)) == 0
    assert "layers 2:6 of 6" in capsys.readouterr().out


def test_a_killed_holder_of_the_lock_blocks_nobody(model: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom hat_runtime.model.cache import lock\n"
        "with lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(600)\n"
    )
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        waiter = threading.Thread(target=prepare, args=(str(model), out))
        waiter.start()
        time.sleep(0.3)
        assert waiter.is_alive()
        assert not out.exists()
        os.kill(holder.pid, signal.SIGKILL)
        waiter.join(30)
    verify_files(out, deep=True)
