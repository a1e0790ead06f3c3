"""benchmarks/exactness.py sees every way in which an answer can leave the reference, and leaves no pair out."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    folder = Path(__file__).parent.parent.parent / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("exactness")


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
        differences = [script.Difference(None, 3, gap) for gap in gaps]
        return script.Run(script.Setting("one", ()), 10, 10, 1.0, differences)

    assert run().passed
    assert run(5e-4).passed
    assert not run(5e-4, 2e-3).passed


def test_every_two_values_of_the_drafting_grid_meet_in_a_setting(script: Any) -> None:
    def values(setting: Any) -> tuple[str, ...]:
        options = dict(zip(setting.options[::2], setting.options[1::2], strict=True))
        drafter = options["--drafter"].partition(":")[0]
        return drafter, options["--window"], options["--branches"], options["--alternatives"], setting.link

    found = [values(setting) for setting in script.drafting_settings(Path("draft"))]
    grid = (script.DRAFTERS, script.WINDOWS, script.BRANCHES, script.ALTERNATIVES, script.LINKS)
    for left, right in combinations(range(len(grid)), 2):
        assert {(one[left], one[right]) for one in found} == set(product(grid[left], grid[right]))
