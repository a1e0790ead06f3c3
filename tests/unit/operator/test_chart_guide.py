"""docs/kubernetes.md says what chart, Makefile and `hat` have: its commands and manifests, without a cluster."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from hat_operator.render import render
from hat_runtime.cli.main import build_parser
from scripts import images

ROOT = Path(__file__).resolve().parents[3]
GUIDE = (ROOT / "docs" / "kubernetes.md").read_text().replace("CLOUD_ADDRESS", "cloud.example.com")
VALUES = yaml.safe_load((ROOT / "charts" / "hat-operator" / "values.yaml").read_text())
COMMANDS = [
    line.strip().split("  #")[0]
    for line in re.sub(r" \\\n\s+", " ", GUIDE).splitlines()
    if line.startswith("    ")
]


def commands(*words: str) -> list[list[str]]:
    """The guide's commands that begin with `words`, and no empty list."""
    found = [shlex.split(line) for line in COMMANDS if line.split()[: len(words)] == list(words)]
    assert found, words
    return found


def value(path: str) -> Any:
    found = VALUES
    for step in path.split("."):
        found = found[step]
    return found


def test_values() -> None:
    named = set(re.findall(r"--set ([\w.]+)=", GUIDE))
    rows = re.findall(r"^\| `([^|]+)` \|", GUIDE, flags=re.M)
    table = {
        name.split("=")[0]
        for row in rows
        for name in row.replace("`, `.", "`, `networkPolicy.apiServer.").split("`, `")
    }
    settings = {name for name in named | table if name.split(".")[0] in VALUES}
    assert {
        "global.imageRegistry",
        "namespaces",
        "rbac.secretNames",
        "uninstall.deleteHatDeployments",
    } <= settings
    assert named <= settings
    for path in settings:
        value(path)


def test_make_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert {words[1] for words in commands("make")} <= targets
    assert {"images", "pin-images"} <= targets


def test_images_that_are_built_are_those_that_are_asked_for() -> None:
    asked = render(manifests()[0], registry="REGISTRY", version="0.1.0")
    (daemonset,) = (one for one in asked.edge if one["kind"] == "DaemonSet")
    used = {container["image"] for container in daemonset["spec"]["template"]["spec"]["containers"]}
    (line,) = (words for words in commands("make", "images") if any("l4t" in word for word in words))
    options = dict(word.split("=", 1) for word in line if "=" in word)
    (build,) = images.plan(
        images.read_variant(options["VARIANT"]), options["REGISTRY"], "0.1.0", "", base=options["BASE_IMAGE"]
    )
    assert {build.reference} == used


def manifests() -> list[str]:
    """The guide's HatDeployments; the first is whole, others are parts of a spec."""
    return [
        block
        for block in re.findall(r"```yaml\n(.*?)```", GUIDE, flags=re.S)
        if "\nkind: HatDeployment\n" in block
    ]


def test_hat_deployments() -> None:
    assert manifests()
    for text in manifests():
        assert render(text).cloud
    whole = yaml.safe_load(manifests()[0])
    parts = [
        block for block in re.findall(r"```yaml\n(.*?)```", GUIDE, flags=re.S) if "apiVersion:" not in block
    ]
    assert parts
    for part in parts:
        changes = yaml.safe_load(part)
        edge = {**whole["spec"]["edge"], **changes.get("edge", {})}
        render(yaml.safe_dump({**whole, "spec": {**whole["spec"], **changes, "edge": edge}}))


def test_hat_commands() -> None:
    parser = build_parser()
    indented = [line.strip() for line in GUIDE.splitlines() if line.strip().startswith("hat ")]
    assert len(indented) >= 2
    for line in indented:
        parser.parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b(?:examples|charts|images)/[\w./-]*\w", GUIDE))))
def test_paths(path: str) -> None:
    assert (ROOT / path).exists()
