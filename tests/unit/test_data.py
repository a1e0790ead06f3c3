"""Prompt files: the four formats, and what a wrong line says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hat_runtime.data import Prompt, read_prompts
from hat_runtime.errors import UsageError

OWN = Path(__file__).parent.parent / "data" / "prompts.jsonl"


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_the_four_formats(tmp_path: Path) -> None:
    file = write(
        tmp_path / "p.jsonl",
        '{"question_id": 81, "category": "x", "turns": ["first", "second"]}',
        '{"prompt": "summarise"}',
        "",
        '{"question": "how many?", "answer": "4"}',
        '{"task_id": "HumanEval/0", "prompt": "def f():\\n"}',
    )
    assert read_prompts(file) == [
        Prompt(81, "first", chat=True),
        Prompt(2, "summarise", chat=True),
        Prompt(4, "how many?", chat=True),
        Prompt("HumanEval/0", "def f():\n", chat=False),
    ]
    assert len(read_prompts(file, limit=2)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", r"line 2: a JSON object is expected, not \[1\]"),
        ('{"text": "x", "n": 1}', "line 2: needs a field turns, question or prompt; it has text, n"),
        ('{"turns": []}', r"line 2: field turns is \[\]"),
        ('{"turns": [7]}', r"line 2: field turns\[0\] is 7"),
        ('{"prompt": ""}', 'line 2: field prompt is ""'),
        ('{"question": null}', "line 2: field question is null"),
        ('{"prompt": "x", "task_id": ["a"]}', r'line 2: field task_id is \["a"\]'),
        (b'{"prompt": "\xff"}', "line 2: not UTF-8 at byte 13"),
    ],
)
def test_wrong_lines_name_file_line_and_field(tmp_path: Path, line: str | bytes, message: str) -> None:
    file = write(tmp_path / "wrong.jsonl", '{"prompt": "fine"}', line)
    with pytest.raises(UsageError, match=rf"wrong\.jsonl, {message}"):
        read_prompts(file)
    assert len(read_prompts(file, limit=1)) == 1


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.jsonl: No such file"):
        read_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(UsageError, match="no prompt in it"):
        read_prompts(write(tmp_path / "empty.jsonl", "", " "))


def test_the_projects_own_prompts() -> None:
    prompts = read_prompts(OWN)
    assert len(prompts) == 24
    assert len({prompt.id for prompt in prompts}) == 24
    assert sum(not prompt.chat for prompt in prompts) == 4


@pytest.mark.parametrize("name", ["spec_bench", "cnn_dm", "gsm8k_test", "humaneval"])
def test_the_report_files_as_they_are(name: str) -> None:
    folder = os.environ.get("HAT_DATA")
    if not folder or not (Path(folder) / f"{name}.jsonl").is_file():
        pytest.skip("HAT_DATA does not name a folder with the report files")
    prompts = read_prompts(Path(folder) / f"{name}.jsonl")
    assert len({prompt.id for prompt in prompts}) == len(prompts) > 50
    assert all(prompt.chat == (name != "humaneval") for prompt in prompts)
