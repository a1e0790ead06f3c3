"""Reading prompts: JSON lines in the formats of Spec-Bench, CNN/DailyMail, GSM8K and HumanEval, as they are.

{"question_id": 81, "turns": ["...", ...]}     the first turn, as a chat message
{"question": "..."}                            a chat message
{"prompt": "..."}                              a chat message
{"task_id": "HumanEval/0", "prompt": "..."}    code to be continued: raw text, no chat template
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hat_runtime.errors import UsageError


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file."""

    id: str | int
    """question_id or task_id, else the line's number from 1."""
    text: str
    chat: bool
    """One user message for the chat template; False: the text itself is continued."""


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of a file; empty lines are skipped.

    Raises:
        UsageError: no such file, no prompt in it, or a line that is none of the formats; names file, line and field.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"--prompts {path}: {error.strerror}") from error
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        if limit is not None and len(prompts) >= limit:
            break
        if line.strip():
            prompts.append(_parse(line, number, f"{path}, line {number}"))
    if not prompts:
        raise UsageError(f"--prompts {path}: no prompt in it")
    return prompts


def _parse(line: bytes, number: int, place: str) -> Prompt:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{place}: not UTF-8 at byte {error.start + 1}") from error
    except ValueError as error:
        raise UsageError(f"{place}: no JSON: {error}") from error
    if not isinstance(record, dict):
        raise UsageError(f"{place}: a JSON object is expected, not {_short(record)}")
    if "turns" in record:
        turns = record["turns"]
        if not isinstance(turns, list) or not turns:
            raise UsageError(f"{place}: field turns is {_short(turns)}, but must be a list with a text in it")
        name, text = "turns[0]", turns[0]
    else:
        name = next((name for name in ("question", "prompt") if name in record), "")
        if not name:
            raise UsageError(
                f"{place}: needs a field turns, question or prompt; it has {', '.join(record) or 'none'}"
            )
        text = record[name]
    if not isinstance(text, str) or not text:
        raise UsageError(f"{place}: field {name} is {_short(text)}, but must be a text that is not empty")
    for key in ("question_id", "task_id"):
        if key in record and not isinstance(record[key], str | int):
            raise UsageError(f"{place}: field {key} is {_short(record[key])}, but must be a text or a number")
    own = [record[key] for key in ("question_id", "task_id") if key in record]
    return Prompt(
        id=own[0] if own else number,
        text=text,
        chat=not ("task_id" in record and name == "prompt"),
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
