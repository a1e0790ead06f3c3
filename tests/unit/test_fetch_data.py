"""benchmarks/fetch_data.py: the rules that pick rows, and the digests of the files it stands for."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def script() -> Any:
    path = Path(__file__).parent.parent.parent / "benchmarks" / "fetch_data.py"
    spec = importlib.util.spec_from_file_location("fetch_data", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def sources(script: Any) -> dict[str, bytes]:
    """Small files in the sources' formats."""

    def lines(rows: list[dict[str, Any]]) -> bytes:
        return "\n".join(map(json.dumps, rows)).encode()

    article = "Article: " + "x" * 200
    files = {
        script.SPEC_BENCH: lines(
            [{"question_id": i, "turns": [f"turn {i}"]} for i in range(6)] + [{"question_id": 7, "turns": ["q 3"]}]
        ),
        script.GSM8K + "test.jsonl": lines([{"question": f"q {i}"} for i in range(300)]),
        script.GSM8K + "train.jsonl": lines([{"question": f"train {i}"} for i in range(2000)]),
        script.HUMANEVAL: gzip.compress(lines([{"task_id": f"HumanEval/{i}", "prompt": "p"} for i in range(5)])),
        f"{script.TEMPLATES}{script.CNN_DM}.jsonl": lines(
            [{"prompt": f"{article} {i % 4}\n", "completion": "c\n"} for i in range(8)]
        ),
        script.SELF_INSTRUCT + "data/seed_tasks.jsonl": lines(
            [
                {"instruction": "Do it.", "instances": [{"input": ""}]},
                {"instruction": "Summarise.", "instances": [{"input": article}]},
            ]
        ),
        script.SELF_INSTRUCT + "human_eval/user_oriented_instructions.jsonl": lines(
            [{"instruction": "Write.", "instances": [{"input": " this "}]}]
        ),
    }  # fmt: skip
    for name in script.DRAFTER_TEMPLATES:
        files[f"{script.TEMPLATES}{name}.jsonl"] = lines([{"prompt": f"{name} {i // 2} "} for i in range(4)])
    return files


def test_report_rows(script: Any) -> None:
    read = sources(script).__getitem__
    assert [row["question_id"] for row in script.spec_bench(read)] == [1, 3, 5, 7]
    assert [row["task_id"] for row in script.humaneval(read)] == ["HumanEval/0", "HumanEval/2", "HumanEval/4"]
    assert [row["prompt"][-1] for row in script.cnn_dm(read)] == ["0", "1"]
    questions = [row["question"] for row in script.gsm8k_test(read)]
    assert len(questions) == 200
    assert "q 3" not in questions


def test_drafter_rows_are_unique_and_share_nothing_with_the_reports(script: Any) -> None:
    prompts = [row["prompt"] for row in script.drafter_prompts(sources(script).__getitem__)]
    assert len(prompts) == len(set(prompts)) == 1500 + 2 * len(script.DRAFTER_TEMPLATES) + 2
    assert {"Do it.", "Write.\n\nthis"} <= set(prompts)


def test_other_content_is_reported(script: Any, tmp_path: Path) -> None:
    assert script.write(tmp_path / "data", sources(script).__getitem__) == list(script.FILES)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted(
        f"{n}.jsonl" for n in script.FILES
    )


def test_the_digest_ignores_order_only(script: Any) -> None:
    rows = [{"a": i, "b": "x"} for i in range(9)]
    assert script.digest(random.Random(1).sample(rows, 9)) == script.digest(rows)
    assert script.digest(rows[1:]) != script.digest(rows)


@pytest.mark.parametrize("name", ["spec_bench", "cnn_dm", "gsm8k_test", "humaneval", "drafter_prompts"])
def test_the_digests_are_those_of_the_report_files(script: Any, name: str) -> None:
    folder = os.environ.get("HAT_DATA")
    if not folder or not (Path(folder) / f"{name}.jsonl").is_file():
        pytest.skip("HAT_DATA does not name a folder with the report files")
    lines = (Path(folder) / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    assert script.digest(json.loads(line) for line in lines if line) == script.DIGESTS[name]
