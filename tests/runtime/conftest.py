"""Fixtures: drafters of a tiny model, trained once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_drafters import perturbed, train_tiny_drafters


@pytest.fixture(scope="session")
def drafters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What --drafter is given, by kind."""
    folder = tmp_path_factory.mktemp("drafters")
    trained = train_tiny_drafters(tiny_llama, folder / "trained", ("adapter", "feature"))
    files = {kind: next(trained.glob(f"*-{kind}.safetensors")) for kind in ("adapter", "feature")}
    return {
        "none": "none",
        "ngram": "ngram",
        "adapter": f"adapter:{files['adapter']}",
        "feature": f"feature:{files['feature']}",
        "hybrid": f"hybrid:{files['feature']}",
        "model": f"model:{perturbed(tiny_llama, folder / 'perturbed', 0.02)}",
        "close": f"model:{perturbed(tiny_llama, folder / 'close', 0.005)}",
        "itself": f"model:{tiny_llama}",
    }
