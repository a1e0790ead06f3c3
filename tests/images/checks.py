"""What holds for every built image."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts import images
from tests.images.conftest import Built

EXTRAS = {"operator": ("operator",), "cloud": ("cloud", "convert"), "edge": ("device", "convert")}
ENTRYPOINT = {"operator": ["hat-operator"], "cloud": ["hat"], "edge": ["hat"]}
SERVE = {"cloud": ("cloud", "serve"), "edge": ("device", "serve")}
_DISTRIBUTIONS = (
    "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
)
_IMPORTS = {
    "operator": "import hat_operator.main, hat_operator.render",
    "cloud": "import torch, hat_runtime.cloud.serve",
    "edge": "import torch, hat_runtime.device.serve, gguf",
}


def check_metadata(built: Built) -> None:
    """Labels, user, entrypoint and environment."""
    found = built.buildah.inspect(built.reference)
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in found["Labels"].items()}
    assert labels["title"] == f"hat-{built.name}"
    assert labels["version"] == images.project_version()
    assert labels["revision"] == built.revision
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", built.revision)
    assert labels["licenses"] == "Apache-2.0"
    assert labels["base.name"].startswith("localhost/")
    assert labels["description"]
    assert found["User"] == "10001:10001"
    assert found["Entrypoint"] == ENTRYPOINT[built.name]
    if built.name != "operator":
        assert tuple(found["Cmd"][:2]) == SERVE[built.name]
    assert found["Healthcheck"]["Test"][0] == "CMD"


def check_commands(built: Built, container: str) -> None:
    """The commands answer as the image's user and write nothing outside /tmp."""
    assert built.run(container, "id", "-u").strip() == "10001"
    root = Path(built.buildah.run("mount", container).strip())
    marker = root / "marker"
    marker.touch()
    assert "usage: hat " in built.run(container, "hat", "--help")
    if built.name == "operator":
        assert "usage: hat-operator" in built.run(container, "hat-operator", "--help")
        assert "usage: hat render" in built.run(container, "hat", "render", "--help")
    else:
        assert "--listen" in built.run(container, "hat", *SERVE[built.name], "--help")
    built.run(container, "python3", "-c", _IMPORTS[built.name])
    listed = subprocess.run(
        ["find", str(root), "-xdev", "-cnewer", str(marker), "-not", "-type", "d"],
        capture_output=True,
        text=True,
        check=True,
    )
    written = {Path("/", Path(line).relative_to(root)) for line in listed.stdout.splitlines()}
    # buildah writes these itself, whatever runs.
    own = {Path("/etc/hosts"), Path("/etc/resolv.conf"), Path("/etc/hostname"), Path("/run/.containerenv")}
    assert {path for path in written - own if path.parts[1] != "tmp"} == set()


def check_packages(built: Built, container: str) -> None:
    """Exactly the locked versions; in the operator's image nothing of torch."""
    said: dict[str, str] = json.loads(built.run(container, "python3", "-c", _DISTRIBUTIONS))
    found = {canonicalize_name(name): version for name, version in said.items()}
    wanted = locked(built)
    assert {name: found.get(name) for name in wanted} == wanted
    if built.name == "operator":
        assert set(found) - {"hat-platform"} == set(wanted)
        assert not {"torch", "transformers", "numpy"} & set(found)
    listed = bill_of_materials(built, container)
    # A torch that the base brings is not ours to list, with what only it needs.
    own = locked(built, "--prune", "torch") if built.volumes else wanted
    unlisted = {name: version for name, version in own.items() if version not in listed.get(name, ())}
    assert not unlisted, unlisted
    assert not built.volumes or "torch" not in listed


def bill_of_materials(built: Built, container: str) -> dict[str, set[str]]:
    """Names and versions of what the image says that it holds; several where the lock tells Pythons apart."""
    path = f"/opt/hat/share/sbom/hat-{built.name}.cdx.json"
    said = json.loads(built.run(container, "cat", path))
    assert (said["bomFormat"], said["specVersion"]) == ("CycloneDX", "1.5")
    found: dict[str, set[str]] = {}
    for one in said["components"]:
        found.setdefault(canonicalize_name(one["name"]), set()).add(one["version"])
    return found


def locked(built: Built, *options: str) -> dict[str, str]:
    """Name and version of what uv.lock has for this image on this platform."""
    extras = [word for extra in EXTRAS[built.name] for word in ("--extra", extra)]
    command = [
        "uv",
        "export",
        "--quiet",
        "--frozen",
        "--no-dev",
        "--no-hashes",
        "--no-emit-project",
        *extras,
        *options,
    ]
    said = subprocess.run(
        [str(images.ROOT / "scripts" / "uv"), *command[1:]],
        cwd=images.ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = [line for line in said.splitlines() if line and not line.lstrip().startswith("#")]
    needed = [Requirement(line) for line in lines]
    # The images' Python is Debian's; its minor version is this one's where markers ask for it.
    assert sys.version_info >= (3, 11)
    environment = {"python_version": "3.11", "python_full_version": "3.11.2"}
    return {
        canonicalize_name(one.name): str(one.specifier).removeprefix("==")
        for one in needed
        if one.marker is None or one.marker.evaluate(environment)
    }
