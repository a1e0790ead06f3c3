"""Fixtures: tiny random models. Importing this stays cheap: most of the operator's tests need no torch."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of a tiny model for every architecture."""
    from tests.tiny_models import ARCHITECTURES, make_tiny_model

    return {name: make_tiny_model(name, tmp_path_factory.mktemp("models") / name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def tiny_llama(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["llama"]


@pytest.fixture(scope="session")
def other_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Same config as tiny_llama, other weights."""
    from tests.tiny_models import make_tiny_model

    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "other", seed=1)
