"""The target's states for every answered text: computed once, kept in files, read in every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hat_runtime.training.answers import AnsweredText
from hat_runtime.training.teacher import Teacher, TeacherText

SHARD_TEXTS = 128
PASS_TOKENS = 1024
TOP = 16
"""The teacher's likeliest tokens that are kept of each position: the rest of the vocabulary teaches next to nothing."""


@dataclass(frozen=True)
class TextStates:
    """What there is to learn from one text of T tokens, of which the first P are the prompt's.

    Row j of deep, top_ids and top_p belongs to position P - 1 + j, whose next token is ids[P + j]; there are T - P.
    """

    ids: torch.Tensor
    """int32 [T]"""
    prompt_tokens: int
    shallow: torch.Tensor
    """[T, hidden_size]"""
    deep: torch.Tensor
    """[T - P, hidden_size], after the final norm."""
    top_ids: torch.Tensor
    """int32 [T - P, TOP], fewer where the vocabulary is smaller"""
    top_p: torch.Tensor
    """float16 [T - P, TOP]"""


def write_features(
    teacher: Teacher, answers: Sequence[AnsweredText], folder: Path, progress: Callable[[int, int], None]
) -> list[Path]:
    """Compute the states of all answers in shards; shards that are there are kept.

    Returns:
        The shards' files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    usable = [answer for answer in answers if len(answer.ids) - answer.prompt_tokens >= 2]
    for first in range(0, len(usable), SHARD_TEXTS):
        path = folder / f"states-{first // SHARD_TEXTS:05d}.safetensors"
        part = usable[first : first + SHARD_TEXTS]
        # The last shard grows with the answers, so it is only taken when it is full or of the same size.
        if not path.is_file() or _texts_in(path) != len(part):
            _write_shard(teacher, part, path)
        shards.append(path)
        progress(min(first + SHARD_TEXTS, len(usable)), len(usable))
    return shards


def read_features(shards: Sequence[Path]) -> Iterator[TextStates]:
    """All texts of some shards; their tensors share the shards' memory."""
    for path in shards:
        tensors = load_file(path)
        texts, answers = 0, 0
        for total, prompt in tensors["lengths"].tolist():
            count = total - prompt
            rows, answered = slice(texts, texts + total), slice(answers, answers + count)
            yield TextStates(
                tensors["ids"][rows],
                prompt,
                tensors["shallow"][rows],
                tensors["deep"][answered],
                tensors["top_ids"][answered],
                tensors["top_p"][answered],
            )
            texts += total
            answers += count


def _texts_in(path: Path) -> int:
    return len(load_file(path)["lengths"])


def _write_shard(teacher: Teacher, answers: Sequence[AnsweredText], path: Path) -> None:
    parts = [state for group in _groups(answers) for state in _states(teacher, group)]
    tensors = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("ids", "shallow", "deep", "top_ids", "top_p")
    }
    tensors["lengths"] = torch.tensor([[len(part.ids), part.prompt_tokens] for part in parts])
    partial = path.with_name(path.name + ".part")
    save_file(tensors, partial)
    partial.replace(path)


def _groups(answers: Sequence[AnsweredText]) -> Iterator[list[AnsweredText]]:
    """As many texts as fit into one pass."""
    group: list[AnsweredText] = []
    for answer in answers:
        if group and sum(len(one.ids) for one in group) + len(answer.ids) > PASS_TOKENS:
            yield group
            group = []
        group.append(answer)
    if group:
        yield group


@torch.inference_mode()
def _states(teacher: Teacher, answers: Sequence[AnsweredText]) -> list[TextStates]:
    texts = [TeacherText() for _ in answers]
    states = teacher.run(texts, [answer.ids for answer in answers])
    for text in texts:
        teacher.release(text)
    found = []
    for answer, state in zip(answers, states, strict=True):
        deep = state.deep[answer.prompt_tokens - 1 : -1]
        top_p, top_ids = torch.softmax(teacher.ends.head(deep), -1).topk(min(TOP, teacher.ends.vocab_size))
        found.append(
            TextStates(
                torch.tensor(answer.ids, dtype=torch.int32),
                answer.prompt_tokens,
                state.shallow.cpu(),
                teacher.ends.final_norm(deep).cpu(),
                top_ids.int().cpu(),
                top_p.half().cpu(),
            )
        )
    return found
