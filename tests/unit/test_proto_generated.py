"""The committed code is what hat_runtime/proto/generate.sh makes of the .proto."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("hat_runtime/proto/hat/v1")


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("proto")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        [ROOT / "hat_runtime/proto/generate.sh", out],
        check=True,
        env={**os.environ, "PATH": path},
        timeout=120,
    )
    return out


@pytest.mark.parametrize("name", ["runtime_pb2.py", "runtime_pb2.pyi", "runtime_pb2_grpc.py"])
def test_generated_code_matches_proto(regenerated: Path, name: str) -> None:
    committed = (ROOT / FOLDER / name).read_text()
    assert committed == (regenerated / FOLDER / name).read_text(), "run `make proto` and commit the result"
