"""The default model through device and cloud processes gives the whole model's tokens (float32, greedy)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.default_model


def exactness(*arguments: object) -> str:
    """The table of benchmarks/exactness.py, which fails where token ids differ."""
    command = [sys.executable, str(ROOT / "benchmarks" / "exactness.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(600)
def test_short(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    prompts = ROOT / "tests" / "data" / "prompts.jsonl"
    exactness("--prompts", prompts, "--limit", 4, "--max-new-tokens", 24, "--out", table)
    assert "4 of prompts.jsonl" in table.read_text()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_long(tmp_path: Path) -> None:
    data = os.environ.get("HAT_DATA")
    if not data:
        pytest.skip("HAT_DATA does not name a folder with spec_bench.jsonl")
    table = tmp_path / "table.md"
    exactness("--prompts", Path(data) / "spec_bench.jsonl", "--out", table)
    assert "40 of spec_bench.jsonl, up to 64 new tokens" in table.read_text()
