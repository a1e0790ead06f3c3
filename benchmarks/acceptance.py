"""Tokens a round of every drafter on the report sets: greedy, gamma 6, eta 0.6, as HAT and Kangaroo count them.

    python benchmarks/acceptance.py            some minutes; writes docs/benchmarks/acceptance.md
    python benchmarks/acceptance.py --short    two prompts of each set; writes nothing

The text is the model's own greedy answer, so every drafter is asked about the same positions: the drafters' real code
runs on true states, a round ends with the first wrong guess, and no link or clock is involved. Answers that fall into
repetition, as a small model's do, flatter n-grams; they are counted with and without.

feature+16 is `feature` with the deep states of the prompt's last 16 tokens, which `hat device serve` does not download:
what it would be worth. hybrid/3 is `hybrid` with the three next likeliest tokens for each draft checked along with it:
where one of them is right, the round gives it and the token behind it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from common import REPORTS, data_prompts, facts, model_folder, progress, report, table

from hat_runtime.control.drafting import StopRule
from hat_runtime.data import Prompt
from hat_runtime.device.chat import PromptEncoder
from hat_runtime.device.drafting.base import Draft, Drafter, Wish
from hat_runtime.device.drafting.factory import drafter_maker
from hat_runtime.device.sampling import SamplingParams
from hat_runtime.errors import HatError
from hat_runtime.model.hf import load_tokenizer
from hat_runtime.model.manifest import identity
from hat_runtime.training.answers import loops
from hat_runtime.training.teacher import States, Teacher, TeacherText

GAMMA, ETA = 6, 0.6
PUBLISHED = {"spec_bench": "HAT: 2.06 (7B)", "cnn_dm": "HAT: 1.98 (13B)"}
SETS = ("spec_bench", "spec_bench/rag", "cnn_dm", "gsm8k_test", "humaneval")
"""Files; behind a / the only category that is asked about."""
LOOP_WINDOW = 32
BRANCHES = 3


@dataclass(frozen=True)
class Answered:
    """A prompt's greedy answer, with what device and cloud would see."""

    prompt_tokens: int
    ids: list[int]
    states: States
    category: str

    @property
    def loops(self) -> bool:
        """Some stretch of the answer repeats itself."""
        answer = self.ids[self.prompt_tokens :]
        windows = range(0, max(0, len(answer) - LOOP_WINDOW + 1), 4)
        return any(loops(answer[first : first + LOOP_WINDOW], LOOP_WINDOW // 2) for first in windows)


@dataclass
class Count:
    """Rounds and what they gave."""

    rounds: int = 0
    tokens: int = 0
    judged: int = 0
    accepted: int = 0
    covered: int = 0
    """Wrong first choices whose second or third choice was right: what a token tree could win."""

    def __iadd__(self, other: Count) -> Count:
        for name in ("rounds", "tokens", "judged", "accepted", "covered"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


def main() -> int:
    args = _arguments()
    folder = model_folder(args.model)
    weights_id = identity(folder).weights_id
    teacher = Teacher(folder, args.input_layers, torch.bfloat16, "cpu", kv_tokens=4096)
    counts: dict[tuple[str, str, bool], Count] = defaultdict(Count)
    texts: dict[str, list[Answered]] = {}
    for name in SETS:
        progress(f"answering {name}")
        texts[name] = list(_answers(teacher, folder, name, args))
    for option in args.drafters:
        name_of, _, alternatives = option.partition("/")
        name_of, _, downloaded = name_of.partition("+")
        maker = drafter_maker(name_of, folder, weights_id, args.input_layers, torch.bfloat16, kv_tokens=4096)
        drafter = maker(teacher.ends)
        assert drafter is not None
        for name, answers in texts.items():
            progress(f"{option} on {name}")
            for answer in answers:
                count = _rounds(drafter, teacher, answer, int(downloaded or 0), int(alternatives or 0))
                counts[option, name, answer.loops] += count
                if name == "spec_bench":
                    counts[option, f"spec_bench: {answer.category}", answer.loops] += count
    body = _body(args, counts, texts)
    print(body)
    if args.out:
        args.out.write_text(report("Tokens a round", _ABOUT, facts(folder), body), encoding="utf-8")
    return 0


def _answers(teacher: Teacher, folder: Path, name: str, args: argparse.Namespace) -> Iterator[Answered]:
    encoder = PromptEncoder(load_tokenizer(folder))
    file, _, only = name.partition("/")
    categories = _categories(file)
    prompts = [
        prompt for prompt in data_prompts(f"{file}.jsonl") if not only or categories[prompt.id] == only
    ]
    step = max(1, len(prompts) // args.prompts)
    for prompt in prompts[::step][: args.prompts]:
        ids = _encode(encoder, prompt)[-args.prompt_tokens :]
        yield _answer(teacher, ids, args.max_new_tokens, categories.get(prompt.id, name))


def _encode(encoder: PromptEncoder, prompt: Prompt) -> list[int]:
    if prompt.chat:
        return encoder.encode_chat([{"role": "user", "content": prompt.text}])
    return encoder.encode_text(prompt.text)


def _categories(name: str) -> dict[str | int, str]:
    import os

    if name != "spec_bench":
        return {}
    lines = (Path(os.environ["HAT_DATA"]) / f"{name}.jsonl").read_text().splitlines()
    return {record["question_id"]: record["category"] for record in map(json.loads, lines)}


def _answer(teacher: Teacher, prompt: list[int], most: int, category: str) -> Answered:
    text, ids, new = TeacherText(), list(prompt), list(prompt)
    parts = []
    while len(ids) < len(prompt) + most:
        state = teacher.run([text], [new])[0]
        parts.append(state)
        token = int(teacher.ends.head(state.deep[-1:]).argmax())
        ids.append(token)
        new = [token]
        if token in teacher.eos_token_ids:
            break
    teacher.release(text)
    states = States(torch.cat([part.shallow for part in parts]), torch.cat([part.deep for part in parts]))
    return Answered(len(prompt), ids, states, category)


@torch.inference_mode()
def _rounds(
    drafter: Drafter, teacher: Teacher, answer: Answered, downloaded: int, alternatives: int
) -> Count:
    """The answer's rounds as the device would have them, after the first token.

    The deep states of the prompt's last `downloaded` tokens are known to the drafter; each draft is checked together
    with `alternatives` others.
    """
    rule, count = StopRule(GAMMA, ETA), Count()
    state = drafter.open()
    prompt, ids, shallow = answer.prompt_tokens, answer.ids, answer.states.shallow
    normed = teacher.ends.final_norm(answer.states.deep)
    unseen = max(1, prompt - downloaded)
    state.note(0, shallow[:unseen], None)
    if unseen < prompt:
        state.note(unseen, shallow[unseen:prompt], normed[unseen - 1 : prompt - 1])
    certain = prompt + 1  # tokens; the first came with the prompt's pass
    noted = prompt
    while certain < len(ids):
        state.note(noted, shallow[noted:certain], normed[noted - 1 : certain - 1])
        noted = certain
        drafts: list[Draft] = []
        right = by_alternative = 0
        position = certain
        while position < len(ids):
            wish = Wish(state, ids[:position], SamplingParams(), False, max(BRANCHES - 1, alternatives))
            (draft,) = drafter.propose([wish])
            if draft is None:
                break
            drafts.append(draft)
            correct = draft.token == ids[position]
            drafter.calibration.observe(draft.source, draft.confidence, correct)
            if not correct:
                count.covered += ids[position] in draft.others[: BRANCHES - 1]
                by_alternative = int(ids[position] in draft.others[:alternatives])
                break
            right += 1
            enough = rule.enough([one.confidence for one in drafts], [1.0], 0.0)
            if enough or position + 1 >= len(ids):
                break
            state.note_draft(position, shallow[position : position + 1])
            position += 1
        gave = right + by_alternative + 1
        certain = min(len(ids), certain + gave)
        count += Count(1, gave, len(drafts), right)
    drafter.release(state)
    return count


def _body(
    args: argparse.Namespace,
    counts: dict[tuple[str, str, bool], Count],
    texts: dict[str, list[Answered]],
) -> str:
    names = list(dict.fromkeys(name for _, name, _ in counts))
    rows = []
    for name in names:
        row = [name]
        for option in args.drafters:
            whole = Count()
            whole += counts[option, name, True]
            whole += counts[option, name, False]
            clean = counts[option, name, False]
            row.append(f"{_per_round(whole)} / {_per_round(clean)}")
        rows.append([*row, PUBLISHED.get(name, "")])
    looping = ", ".join(
        f"{name} {sum(answer.loops for answer in answers)} of {len(answers)}"
        for name, answers in texts.items()
    )

    def shares(of: Callable[..., float]) -> str:
        cells = (
            [f"{of(counts[option, name, True], counts[option, name, False]):.2f}" for option in args.drafters]
            for name in SETS
        )
        return table(["set", *args.drafters], [[name, *cell] for name, cell in zip(SETS, cells, strict=True)])

    return (
        f"{table(['set', *args.drafters, 'published'], rows)}\n\nEach cell: all answers / those without repetition. "
        f"Answers with repetition: {looping}.\n\nAcceptance of a draft whose predecessors were right:\n\n"
        f"{shares(_share)}\n\nWrong drafts whose second or third choice was right:\n\n{shares(_covered)}"
    )


def _per_round(count: Count) -> str:
    return f"{count.tokens / count.rounds:.2f}" if count.rounds else "-"


def _share(*parts: Count) -> float:
    return sum(part.accepted for part in parts) / max(1, sum(part.judged for part in parts))


def _covered(*parts: Count) -> float:
    wrong = sum(part.judged - part.accepted for part in parts)
    return sum(part.covered for part in parts) / max(1, wrong)


_ABOUT = f"""
Tokens that a round gives, the target's own included: greedy, at most {GAMMA} drafts, a draft of less confidence than
{ETA} ends the chain. Answers are the model's own, up to their end or --max-new-tokens; prompts are taken evenly from
each set and cut to their last --prompt-tokens tokens.
"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts", type=int, default=24, metavar="N", help="of each set (default %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=96, metavar="N", help="default %(default)s")
    parser.add_argument("--prompt-tokens", type=int, default=1024, metavar="N", help="default %(default)s")
    parser.add_argument("--input-layers", type=int, default=3, metavar="M")
    parser.add_argument(
        "--drafters",
        nargs="+",
        default=["ngram", "adapter", "feature", "hybrid", "hybrid/1", "hybrid/3"],
        metavar="NAME",
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: the default model")
    parser.add_argument("--short", action="store_true", help="2 prompts of each set, no report")
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    args = parser.parse_args()
    if args.short:
        args.prompts, args.max_new_tokens = 2, 32
    elif args.out is None:
        args.out = REPORTS / "acceptance.md"
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HatError as error:
        sys.exit(f"acceptance: {error}")
