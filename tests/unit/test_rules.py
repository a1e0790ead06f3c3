"""Alerts and recording rules: promtool's verdict, and a page and a test for each alert."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.harness import binaries, boards
from tests.harness.ci import skip_or_fail

RUNBOOKS = boards.ROOT / "docs" / "runbooks"
TESTS = boards.ROOT / "tests" / "rules"


@pytest.fixture(scope="module")
def promtool() -> Path:
    try:
        return binaries.find("promtool")
    except binaries.MissingProgramError as error:
        skip_or_fail(str(error))


def run(promtool: Path, *arguments: str | Path) -> None:
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_are_valid(promtool: Path) -> None:
    run(promtool, "check", "rules", "--lint-fatal", boards.RULES)


@pytest.mark.parametrize("alert", boards.alerts())
def test_fires_when_it_should_and_not_else(promtool: Path, alert: str) -> None:
    path = TESTS / f"{alert}.yaml"
    cases = [
        case
        for test in yaml.safe_load(path.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["alertname"] == alert
    ]
    assert {bool(case.get("exp_alerts")) for case in cases} == {True, False}
    run(promtool, "test", "rules", path)


def test_a_wrong_threshold_fails(promtool: Path, tmp_path: Path) -> None:
    """The tests above would not pass with any rule."""
    rules = boards.RULES.read_text().replace("vector(2)", "vector(9)")
    (tmp_path / "hat.rules.yaml").write_text(rules)
    test = yaml.safe_load((TESTS / "HatTtftTargetMissed.yaml").read_text())
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({**test, "rule_files": ["hat.rules.yaml"]}))
    done = subprocess.run(
        [promtool, "test", "rules", tmp_path / "test.yaml"], capture_output=True, timeout=60, check=False
    )
    assert done.returncode != 0


def test_each_alert_has_its_page_and_its_test_and_no_other_is_there() -> None:
    assert {path.stem for path in RUNBOOKS.iterdir()} == set(boards.alerts())
    assert {path.stem for path in TESTS.iterdir()} == set(boards.alerts())


@pytest.mark.parametrize("alert", boards.alerts())
def test_alert_and_page(alert: str) -> None:
    rule, text = boards.alerts()[alert], (RUNBOOKS / f"{alert}.md").read_text()
    assert rule["annotations"]["runbook_url"] == f"docs/runbooks/{alert}.md"
    assert {"summary", "description"} < set(rule["annotations"])
    assert rule["for"]
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert text.startswith(f"# {alert}\n")
    assert re.findall(r"^## (.*)$", text, flags=re.M) == ["What users notice", "Look at", "What to do"]
    assert re.search(rf"Severity:\s{rule['labels']['severity']}", text)


@pytest.mark.parametrize("alert", boards.alerts())
def test_panels_that_a_page_names_exist(alert: str) -> None:
    titles = {panel["title"] for name in boards.BOARDS for panel in boards.panels(name)}
    text = (RUNBOOKS / f"{alert}.md").read_text()
    # Panels are named in quotes, from a capital on.
    named = {" ".join(name.split()) for name in re.findall(r'(?<![=\w])"([A-Z][^"]+)"', text)}
    assert named <= titles


def test_dashboards_name_alerts_that_exist() -> None:
    text = "".join(path.read_text() for path in boards.FOLDER.iterdir())
    named = set(re.findall(r"\bHat[A-Z]\w+", text))
    assert named - {"HatDeployment", "HatDeployments"} <= set(boards.alerts())
    assert len(named) > 5
