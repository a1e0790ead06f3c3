"""Fetch the prompts that benchmarks report on and drafters train on, from their public sources.

    python benchmarks/fetch_data.py FOLDER      then: export HAT_DATA=FOLDER

Writes spec_bench.jsonl, cnn_dm.jsonl, gsm8k_test.jsonl, humaneval.jsonl (report only on these) and
drafter_prompts.jsonl (train only on this; it shares no prompt with the others). Sources are pinned to commits, and what
comes out is compared with known digests. Licences: Spec-Bench and self-instruct Apache-2.0, GSM8K and HumanEval MIT.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Read = Callable[[str], bytes]
"""read("OWNER/NAME/COMMIT/PATH") -> the file."""

RAW = "https://raw.githubusercontent.com/"
SPEC_BENCH = "hemingkx/Spec-Bench/fd2c1cd7d2201ef71db4c5f4e455008f017967bf/data/spec_bench/question.jsonl"
GSM8K = "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/"
HUMANEVAL = "openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz"
SELF_INSTRUCT = "yizhongw/self-instruct/0b26ccaa415992100fa32df62d41b994cf928e23/"
TEMPLATES = SELF_INSTRUCT + "data/finetuning/t0_train_50k/data_per_template/"
CNN_DM = "cnn_dailymail_3_0_0_2_or_3_sentences"
DRAFTER_TEMPLATES = (
    "quoref_Answer_Friend_Question",
    "dream_answer_to_dialogue",
    "ropes_plain_no_background",
    "xsum_summarize_DOC",
    "sciq_Direct_Question",
    "samsum_Summarize_this_dialogue_",
    "wiki_qa_exercise",
    "wiki_bio_what_content",
    "yelp_review_full_based_on_that",
    "quartz_having_read_above_passage",
    "duorc_SelfRC_answer_question",
    "cosmos_qa_context_question_description_text",
)
GSM8K_TEST_ROWS = 200
GSM8K_TRAIN_ROWS = 1500
COMMON_CHARS = 80
"""From so many characters on, a text in two prompts is the same text."""

DIGESTS = {
    "spec_bench": "fb423c1eeb547fb5c64fa5ee7e4bcc45c01c772074ed8cf0ccd6c19d4a8eadb0",
    "cnn_dm": "9357c08f1a5f1848c53e057e9d4b2ae7b2516fb3e0d860f07484ed22c91c7875",
    "gsm8k_test": "e1a451c7ba095b35ccb27b90df65a5cc9b7f15b966864b50472e41aca0ef4abd",
    "humaneval": "0e23596e432860a804865362c0236770c3c9227587d2a638083a94b224914dd0",
    "drafter_prompts": "ceda6a4da50761d5bd9819147acd670bfa6aa818214e058d7eb1bcdbd645ce76",
}
"""Of each file's rows, in any order: see digest()."""


def spec_bench(read: Read) -> list[Row]:
    """Every second question."""
    return [row for row in _rows(read(SPEC_BENCH)) if row["question_id"] % 2]


def cnn_dm(read: Read) -> list[Row]:
    """The first half of the different prompts."""
    rows = _unique(
        (row["prompt"].strip(), row["completion"].strip())
        for row in _rows(read(f"{TEMPLATES}{CNN_DM}.jsonl"))
    )
    return [{"prompt": prompt, "reference": reference} for prompt, reference in rows[: len(rows) // 2]]


def gsm8k_test(read: Read) -> list[Row]:
    """The first questions that are not in Spec-Bench too."""
    taken = {turn for row in _rows(read(SPEC_BENCH)) for turn in row["turns"]}
    return [row for row in _rows(read(GSM8K + "test.jsonl")) if row["question"] not in taken][
        :GSM8K_TEST_ROWS
    ]


def humaneval(read: Read) -> list[Row]:
    """Every second task."""
    rows = _rows(gzip.decompress(read(HUMANEVAL)))
    return [row for row in rows if int(row["task_id"].rpartition("/")[2]) % 2 == 0]


def drafter_prompts(read: Read) -> list[Row]:
    """GSM8K's training questions, T0 templates and self-instruct's instructions, shuffled.

    One of the instructions is about an article of cnn_dm and is left out.
    """
    articles = [row["prompt"] for row in cnn_dm(read)]
    train = [row["question"] for row in _rows(read(GSM8K + "train.jsonl"))]
    sources = {"gsm8k_train": random.Random(0).sample(train, GSM8K_TRAIN_ROWS)}
    for name in DRAFTER_TEMPLATES:
        sources[name] = [row["prompt"].strip() for row in _rows(read(f"{TEMPLATES}{name}.jsonl"))]
    sources["self_instruct_seed"] = _instructions(read(SELF_INSTRUCT + "data/seed_tasks.jsonl"))
    sources["self_instruct_user"] = _instructions(
        read(SELF_INSTRUCT + "human_eval/user_oriented_instructions.jsonl")
    )
    rows = [
        {"prompt": prompt, "source": source}
        for source, prompts in sources.items()
        for prompt, _ in _unique((prompt, "") for prompt in prompts)
        if not _about_one_of(articles, prompt)
    ]
    random.Random(0).shuffle(rows)
    return rows


FILES = {
    "spec_bench": spec_bench,
    "cnn_dm": cnn_dm,
    "gsm8k_test": gsm8k_test,
    "humaneval": humaneval,
    "drafter_prompts": drafter_prompts,
}


def digest(rows: Iterable[Row]) -> str:
    """sha256 over the sorted rows."""
    lines = sorted(json.dumps(row, sort_keys=True) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fetch(path: str) -> bytes:
    """One file of a public repository at a commit."""
    with urllib.request.urlopen(RAW + path, timeout=60) as reply:
        data: bytes = reply.read()
    return data


def write(folder: Path, read: Read) -> list[str]:
    """Write all five files; returns the names of those whose rows are not the known ones."""
    folder.mkdir(parents=True, exist_ok=True)
    others = []
    for name, build in FILES.items():
        rows = build(read)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        known = digest(rows) == DIGESTS[name]
        print(f"{name}.jsonl: {len(rows)} rows{'' if known else ', not the known ones'}", file=sys.stderr)
        if not known:
            others.append(name)
    return others


def _rows(data: bytes) -> list[Row]:
    return [json.loads(line) for line in data.decode("utf-8").split("\n") if line.strip()]


def _unique(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    for prompt, reference in rows:
        found.setdefault(prompt, reference)
    return list(found.items())


def _about_one_of(articles: list[str], prompt: str) -> bool:
    start = prompt.partition("\n\n")[2][:COMMON_CHARS]
    return len(start) == COMMON_CHARS and any(start in article for article in articles)


def _instructions(data: bytes) -> list[str]:
    """Instruction and, where there is one, its first input."""
    return [
        "\n\n".join(filter(None, (row["instruction"].strip(), row["instances"][0]["input"].strip())))
        for row in _rows(data)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to write, for example data")
    args = parser.parse_args()
    try:
        others = write(args.folder, fetch)
    except (urllib.error.URLError, TimeoutError) as error:
        sys.exit(f"fetch_data: {getattr(error, 'url', RAW)} cannot be fetched: {error}")
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
