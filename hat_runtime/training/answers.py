"""The target model answers the training prompts: the text that its drafter will have to guess.

Answers go into a file, one JSON object a line, as they are finished; a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hat_runtime.training.teacher import Teacher, TeacherText

LOOP_TOKENS = 48
"""An answer whose last tokens repeat themselves for this long is cut: it has nothing more to teach."""
LOOP_PERIOD = 16


@dataclass(frozen=True)
class AnswerOptions:
    """How prompts are answered."""

    max_new_tokens: int = 192
    samples: int = 1
    """Answers of each prompt: the first is greedy, the others are sampled."""
    temperature: float = 0.8
    concurrency: int = 96
    max_prompt_tokens: int = 512
    """Longer prompts are left out."""


@dataclass(frozen=True)
class AnsweredText:
    """A prompt with its answer."""

    key: tuple[int, int]
    """(prompt's index, sample's index)."""
    ids: list[int]
    prompt_tokens: int


@dataclass(eq=False)
class _Running:
    key: tuple[int, int]
    ids: list[int]
    prompt_tokens: int
    text: TeacherText
    new: list[int]
    """Tokens that are not in the caches yet."""


def read_answers(path: Path) -> list[AnsweredText]:
    """The answers of a file, in its order; an unfinished last line is dropped."""
    if not path.is_file():
        return []
    answers = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        answers.append(AnsweredText(tuple(record["key"]), record["ids"], record["prompt_tokens"]))
    return answers


def write_answers(
    teacher: Teacher,
    prompts: Sequence[Sequence[int]],
    path: Path,
    options: AnswerOptions,
    progress: Callable[[int, int], None],
) -> None:
    """Answer what the file lacks.

    Args:
        teacher: the target; its caches must hold `concurrency` texts of prompt and answer.
        prompts: token ids.
        path: where the answers are and go, JSON lines.
        options: how.
        progress: called with (answers there, answers wanted).
    """
    done = {answer.key for answer in read_answers(path)}
    keys = [
        (index, sample)
        for sample in range(options.samples)
        for index, prompt in enumerate(prompts)
        if len(prompt) <= options.max_prompt_tokens
    ]
    total, there = len(keys), len(done.intersection(keys))
    waiting = [key for key in keys if key not in done]
    # Greedy answers first, in an order that does not depend on the file's: what there is after half of the time is a
    # fair sample of the prompts.
    random.Random(0).shuffle(waiting)
    waiting.sort(key=lambda key: key[1])
    waiting = [
        key for block in _blocks(waiting) for key in sorted(block, key=lambda key: len(prompts[key[0]]))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        for answer in _answer_all(teacher, prompts, waiting, options):
            record = {"key": answer.key, "prompt_tokens": answer.prompt_tokens, "ids": answer.ids}
            out.write(json.dumps(record) + "\n")
            out.flush()
            there += 1
            progress(there, total)


def _blocks(keys: Sequence[tuple[int, int]], size: int = 512) -> Iterator[Sequence[tuple[int, int]]]:
    """Texts of like length run together, so that their attention needs little padding."""
    for first in range(0, len(keys), size):
        yield keys[first : first + size]


def _answer_all(
    teacher: Teacher,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[tuple[int, int]],
    options: AnswerOptions,
) -> Iterator[AnsweredText]:
    """Continuous batching: a finished answer makes room for the next prompt at once."""
    generator = torch.Generator().manual_seed(len(keys))
    upcoming = iter(keys)
    running: list[_Running] = []
    while True:
        while len(running) < options.concurrency and (key := next(upcoming, None)) is not None:
            ids = list(prompts[key[0]])
            running.append(_Running(key, ids, len(ids), TeacherText(), list(ids)))
        if not running:
            return
        states = teacher.run([one.text for one in running], [one.new for one in running])
        logits = teacher.ends.head(torch.cat([state.deep[-1:] for state in states]))
        for row, one in enumerate(running):
            token = _choose(logits[row], options.temperature if one.key[1] else 0.0, generator)
            one.ids.append(token)
            one.new = [token]
        finished = [one for one in running if _ended(one, teacher, options)]
        for one in finished:
            teacher.release(one.text)
            yield AnsweredText(one.key, one.ids, one.prompt_tokens)
        running = [one for one in running if one not in finished]


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0.0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.cpu() / temperature, -1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _ended(one: _Running, teacher: Teacher, options: AnswerOptions) -> bool:
    count = len(one.ids) - one.prompt_tokens
    return (
        one.ids[-1] in teacher.eos_token_ids
        or count >= options.max_new_tokens
        or len(one.ids) >= teacher.context_length
        or (count >= LOOP_TOKENS and loops(one.ids[-LOOP_TOKENS:]))
    )


def loops(ids: Sequence[int], longest: int = LOOP_PERIOD) -> bool:
    """Whether a run of tokens repeats itself with a period of at most `longest` tokens."""
    return any(ids[period:] == ids[:-period] for period in range(1, longest + 1))
