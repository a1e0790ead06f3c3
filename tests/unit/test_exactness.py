"""The comparison of benchmarks/exactness.py sees every way in which an answer can leave the reference."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def script() -> Any:
    path = Path(__file__).parent.parent.parent / "benchmarks" / "exactness.py"
    spec = importlib.util.spec_from_file_location("exactness", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("expected", "found", "index"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2], [1, 2, 3], 2),
        ([1], [], 0),
    ],
)
def test_first_difference(script: Any, expected: list[int], found: list[int], index: int | None) -> None:
    assert script.first_difference(expected, found) == index


def test_a_difference_passes_only_where_the_reference_was_undecided(script: Any) -> None:
    def run(*gaps: float) -> Any:
        return script.Run(1, 128, 10, 1.0, [script.Difference(None, 3, gap) for gap in gaps])

    assert run().passed
    assert run(5e-4).passed
    assert not run(5e-4, 2e-3).passed
