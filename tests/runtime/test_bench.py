"""`hat bench` and the capacity benchmark in their short forms: real processes, a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hat_runtime.cli.processes import hat_command
from tests.runtime.picospec_pair import perturbed
from tests.tiny_chat import make_tiny_chat_model

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("bench") / "words.jsonl"
    file.write_text('{"question": "The quick brown fox"}\n{"question": "one two three one two"}\n')
    return file


def bench(*options: object) -> subprocess.CompletedProcess[str]:
    command = hat_command("bench", *map(str, options))
    return subprocess.run(command, capture_output=True, text=True, check=False)


def figures(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    found = json.loads(out.with_suffix(".json").read_text())
    for part in found if isinstance(found, list) else [found]:
        rows += part["rows"]
    assert out.with_suffix(".svg").read_text().startswith("<?xml")
    return rows


@pytest.mark.timeout(400)
def test_the_hat_suite(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    options = ("--model", model, "--prompts", prompts, "--limit", 2, "--max-new-tokens", 6, "--sessions", 1)
    names = ("U-shape", "server-only chunking", "+ alternatives")
    options = (*options, *(option for name in names for option in ("--row", name)))
    done = bench(*options, "--input-layers", 2, "--drafter", "ngram", "--link", "60mbit,10ms", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = figures(out)
    assert tuple(row["row"] for row in rows) == names
    for row in rows:
        assert len(row["ttfts_s"]) == 2
        assert set(row["ttft"]) == {"words"}
        assert min(*row["ttfts_s"], row["tbt_s"], row["tbt_limit_s"], row["ttft"]["words"]["limit_s"]) > 0
        assert f"| {row['row']} |" in out.read_text()


@pytest.mark.timeout(400)
def test_the_picospec_suite(model: Path, prompts: Path, tmp_path: Path) -> None:
    out, draft = tmp_path / "table.md", perturbed(model, tmp_path / "draft", 0.01)
    options = ("--suite", "picospec", "--model", model, "--draft-model", draft, "--prompts", prompts)
    done = bench(*options, "--limit", 2, "--max-new-tokens", 6, "--link", "100mbit,5ms", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = figures(out)
    assert [row["way"] for row in rows] == ["cloud alone", "synchronous", "PicoSpec"]
    assert all(row["tokens_per_s"] > 0 and row["bound_s"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--max-draft", 3), "--max-draft 3 goes with --suite picospec"),
        (("--suite", "picospec", "--drafter", "ngram"), "--drafter ngram goes with --suite hat"),
        (("--limit", 0), "--limit 0"),
        (("--row", "+ all"), "--row '+ all': there are U-shape, server-only chunking"),
    ],
)
def test_options_that_do_not_go_together(prompts: Path, options: tuple[object, ...], says: str) -> None:
    done = bench("--prompts", prompts, *options)
    assert done.returncode == 2
    assert says in done.stderr


@pytest.mark.timeout(300)
def test_capacity(model: Path, prompts: Path) -> None:
    script = ROOT / "benchmarks" / "capacity.py"
    options = ("--short", "--json", "--model", model, "--prompts", prompts, "--input-layers", "2")
    command = [sys.executable, str(script), *map(str, options), "--drafter", "ngram"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)
    assert [(row["drafts"], row["sessions"]) for row in rows] == [
        (drafts, sessions) for drafts in (False, True) for sessions in (1, 4)
    ]
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert all(row["tokens_a_round"] == 1 for row in rows if not row["drafts"])


@pytest.mark.timeout(300)
def test_overload(model: Path, prompts: Path) -> None:
    script = ROOT / "benchmarks" / "overload.py"
    options = ("--short", "--json", "--model", model, "--prompts", prompts, "--input-layers", "2")
    command = [sys.executable, str(script), *map(str, options), "--drafter", "ngram"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    alone, many, without, with_quotas = found["rows"]
    assert alone["refusals"] == 0
    assert all(row["answers"] > 0 and row["tbt_p99_s"] > 0 for row in found["rows"])
    assert without["devices"] == with_quotas["devices"] == 3 * max(2, round(many["sessions"]))
    assert with_quotas["refusals"] > 0  # that many devices are more than the quotas let in
    assert 0 < with_quotas["modest_share"] < 1
    assert found["memory"]["most"] > 0


@pytest.mark.timeout(300)
def test_fleet_simulation_and_its_check(model: Path, prompts: Path) -> None:
    """In its short form; and 8 replayed devices against a real cloud, simulated with what was measured there."""
    script = str(ROOT / "benchmarks" / "fleet_simulation.py")
    done = subprocess.run([sys.executable, script, "--short"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("| HAT")] == [
        "| HAT, predictive"
    ] * 3
    options = ("--check", "--short", "--json", "--model", model, "--prompts", prompts, "--input-layers", 2)
    command = [sys.executable, script, *map(str, options), "--drafter", "ngram"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["answers"] == 16
    assert all(found[name][kind] > 0 for name in ("TTFT", "TBT") for kind in ("real_s", "simulated_s"))
