"""What is installed is what was locked, it is listed, and nothing that is received is ever run."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from scripts.sbom import EXTRAS, bill

ROOT = Path(__file__).resolve().parents[2]
LOCK = {package["name"]: package for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
DOCKERFILES = sorted((ROOT / "images").glob("*/Dockerfile"))
CODE = sorted([*(ROOT / "hat_runtime").rglob("*.py"), *(ROOT / "operator").rglob("*.py")])
RUNS_CODE = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "jsonpickle",
}
"""Modules whose loads may run what they read."""


def hashes(package: dict[str, Any]) -> set[str]:
    files = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else ())]
    return {file["hash"].removeprefix("sha256:") for file in files}


@pytest.mark.parametrize("name", EXTRAS)
def test_the_bill_of_materials_is_what_uv_lock_holds(name: str) -> None:
    found = bill(EXTRAS[name])
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.5")
    assert found["metadata"]["component"]["name"] == "hat-platform"
    components = {one["name"]: one for one in found["components"]}
    assert len(components) > 15
    for one in components.values():
        locked = LOCK[one["name"]]
        assert one["version"] == locked["version"]
        assert one["purl"] == f"pkg:pypi/{one['name']}@{one['version']}"
        listed = {part["content"] for file in one["externalReferences"] for part in file["hashes"]}
        assert listed == hashes(locked)
    assert ("torch" in components) == (name != "hat-operator")
    # Whole: whatever a listed package needs is listed too.
    needed = {need["name"] for one in components for need in LOCK[one].get("dependencies", ())}
    assert needed <= components.keys()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_images_install_nothing_that_has_no_hash(path: Path) -> None:
    text = path.read_text().replace("\\\n", " ")
    installs = re.findall(r"\S*pip [^&;\n]*?\b(?:install|wheel)\b[^&;\n]*", text)
    assert len(installs) >= 4
    for command in installs:
        chosen = '"${TORCH}"' in command  # by whoever builds: another torch than uv.lock's
        own = "--no-deps" in command and ("/opt/wheel/" in command or "--no-build-isolation" in command)
        assert "--require-hashes" in command or own or chosen, command
    assert f"/opt/hat/share/sbom/hat-{path.parent.name}.cdx.json" in text
    assert "--format cyclonedx1.5" in text


def test_the_tools_that_build_images_are_pinned_with_hashes() -> None:
    text = (ROOT / "images" / "build.txt").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert all(re.match(r"[a-z0-9-]+==\S+ +--hash=sha256:[0-9a-f]{64}", line) for line in lines)
    pinned = re.search(r"^pinned=(\S+)", (ROOT / "scripts" / "uv").read_text(), re.MULTILINE)
    assert pinned is not None
    assert any(line.startswith(f"uv=={pinned[1]} ") for line in lines)


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Every call with its dotted name."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_that_is_read_can_run_code() -> None:
    """Beyond ruff's S rules: neither imports nor loads of formats that are programs, whoever wrote the file."""
    assert len(CODE) > 150
    for path in CODE:
        tree = ast.parse(path.read_text())
        imported = {
            name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
        }
        assert not imported & RUNS_CODE, path
        for name, call in calls(tree):
            options = {word.arg: ast.unparse(word.value) for word in call.keywords}
            if name in ("eval", "exec", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "torch.jit.load"):
                raise AssertionError(f"{path}: {name}")
            if name == "torch.load":  # a training run's own checkpoint
                assert path.name == "trainer.py", path
                assert options.get("weights_only") == "True", path
            if name in ("np.load", "numpy.load"):
                assert options.get("allow_pickle") == "False", path
            if name.startswith("AutoModel") and name.endswith(".from_pretrained"):
                assert options.get("use_safetensors") == "True", path
            assert options.get("trust_remote_code", "False") == "False", path
            assert options.get("shell", "False") == "False", path
