from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml

from hat_operator.render import render
from hat_runtime.cli.main import main
from tests.unit.operator.restricted import pods, violations
from tests.unit.operator.test_schema import EXAMPLES, ROOT

SMOLLM2 = ROOT / "examples/smollm2.yaml"


def test_the_examples_are_there() -> None:
    assert {path.name for path in EXAMPLES} >= {"smollm2.yaml", "vicuna-7b-jetson.yaml"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_render_prints_every_object_of_an_example(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "-f", str(example), "--registry", "r.example.org/", "--version", "7"]) == 0
    text = capsys.readouterr().out
    objects = list(yaml.safe_load_all(text))
    desired = render(example.read_text(), registry="r.example.org", version="7")
    assert objects == [*desired.cloud, *desired.edge]
    seen = dict(pods(objects))
    assert {name.split()[0] for name in seen} == {"Deployment", "DaemonSet"}
    for pod in seen.values():
        assert violations(pod) == []
        assert pod["containers"][0]["image"].startswith("r.example.org/hat-")
        assert ":7" in pod["containers"][0]["image"]
    assert "&id" not in text
    assert not [thing for thing in objects if "ownerReferences" in thing["metadata"]]


def test_jetson_example_asks_for_what_jetsons_need() -> None:
    desired = render((ROOT / "examples/vicuna-7b-jetson.yaml").read_text(), version="7")
    (daemonset,) = [thing for thing in desired.edge if thing["kind"] == "DaemonSet"]
    pod = daemonset["spec"]["template"]["spec"]
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["nodeSelector"]["hat.dev/l4t"] == "r36.4"
    assert pod["containers"][0]["image"] == "hat-edge:7-l4t-r36.4"


def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(SMOLLM2.read_text()))
    assert main(["render", "-f", "-"]) == 0
    assert "kind: DaemonSet" in capsys.readouterr().out


def test_each_problem_is_told_with_field_and_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hat.yaml"
    body = yaml.safe_load(SMOLLM2.read_text())
    body["spec"]["split"]["inputLayers"] = 0
    body["spec"]["cloud"]["replica"] = 3
    file.write_text(yaml.safe_dump(body))
    assert main(["render", "-f", str(file)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "spec.split.inputLayers: 0: must be at least 1" in said.err
    assert "spec.cloud.replica: 3: unknown field" in said.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not YAML"),
        ("", "0 documents"),
        ("kind: HatDeployment", "apiVersion: None: must be hat.dev/v1alpha1"),
        ("apiVersion: hat.dev/v1alpha1\nkind: Pod", "kind: 'Pod': must be HatDeployment"),
        ("- 1", "write one HatDeployment"),
    ],
)
def test_what_is_no_hatdeployment(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hat.yaml"
    file.write_text(text)
    assert main(["render", "-f", str(file)]) == 2
    assert words in capsys.readouterr().err


def test_a_quantity_that_is_none_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "hat.yaml"
    body = yaml.safe_load(SMOLLM2.read_text())
    body["spec"]["cloud"]["resources"] = {"requests": {"cpu": "fast"}}
    file.write_text(yaml.safe_dump(body))
    assert main(["render", "-f", str(file)]) == 2
    assert 'spec.cloud.resources.requests.cpu: "fast": must match' in capsys.readouterr().err


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "-f", "missing.yaml"]) == 2
    assert "missing.yaml" in capsys.readouterr().err
