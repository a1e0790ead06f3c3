"""The fault suite's short form: three answers for each fault. `make faults` runs the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.faulting import FAULTS, Want, scene, strike, whole_text
from tests.tiny_drafters import perturbed

MODES = ("hat", "picospec")
BOTH_MODES = ("link cut", "link away for longer than the TTL", "a pass raises once")


@pytest.fixture(scope="module")
def want(tiny_llama: Path) -> Want:
    return whole_text(tiny_llama)


@pytest.fixture(scope="module")
def draft(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model that often says what the model says."""
    return str(perturbed(tiny_llama, tmp_path_factory.mktemp("draft") / "close", 0.005))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", MODES)
async def test_faults(mode: str, tiny_llama: Path, draft: str, want: Want) -> None:
    """Every answer is the uninterrupted one, or ends with an error where the contract says so; nothing is left."""
    drafter = str(draft) if mode == "picospec" else f"model:{draft}"
    faults = {name: fault for name, fault in FAULTS.items() if mode == "hat" or name in BOTH_MODES}
    wrong: dict[str, list[str]] = {}
    for options in dict.fromkeys(fault.options for fault in faults.values()):
        async with scene(mode, tiny_llama, drafter, options) as there:
            for name, fault in faults.items():
                if fault.options == options:
                    tally = await strike(there, name, fault, want, 3)
                    print(f"{mode}: {name}: {tally}")
                    if tally.wrong:
                        wrong[name] = tally.wrong
    assert not wrong
