"""What is asked in a soak, and what plain decoding with the whole model answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hat_runtime.device.chat import PromptEncoder
from hat_runtime.model.hf import load_tokenizer
from hat_runtime.model.sampling import SamplingParams
from tests.runtime.picospec_pair import Whole

LONGEST = 48
"""Tokens of an answer."""
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "one two three four five six seven",
    "A model is cut in three, and only hidden states cross the network. " * 6,
    "Zwei Köche, déjà vu, naïve café",
)
SAMPLINGS = (
    SamplingParams(),
    SamplingParams(0.3, 1.0, 11),
    SamplingParams(0.8, 0.9, 12),
    SamplingParams(1.3, 0.95, 13),
)


@dataclass(frozen=True)
class Question:
    """A request without its length, and all that the answer may begin with."""

    path: str
    body: dict[str, Any]
    ids: tuple[int, ...]
    """LONGEST tokens, fewer where a stop token ended the text; it is not among them."""
    stopped: bool

    def tokens(self, most: int) -> tuple[int, ...]:
        """The tokens of an answer of at most `most`."""
        return self.ids[:most]


@dataclass(frozen=True)
class Exam:
    """All questions to one model."""

    questions: Sequence[Question]
    encoder: PromptEncoder

    def text(self, question: Question, most: int) -> str:
        """The right answer of at most `most` tokens."""
        shown = self.encoder.detokenizer.stream()
        return "".join(map(shown.feed, question.tokens(most))) + shown.finish()


def make_exam(folder: Path, name: str) -> Exam:
    """Chats and completions in each sampling, answered by transformers' whole model in float32."""
    tokenizer, whole = load_tokenizer(folder), Whole(folder)
    encoder, stops = PromptEncoder(tokenizer), frozenset({int(tokenizer.eos_token_id)})
    questions = []
    for number, text in enumerate(TEXTS):
        for params in SAMPLINGS:
            fields: dict[str, Any] = {
                "model": name,
                "temperature": params.temperature,
                "top_p": params.top_p,
                "seed": params.seed,
            }
            if number % 2:
                path, prompt = "/v1/completions", encoder.encode_text(text)
                fields["prompt"] = text
            else:
                messages = [{"role": "user", "content": text}]
                path, prompt = "/v1/chat/completions", encoder.encode_chat(messages)
                fields["messages"] = messages
            ids = whole.decode(prompt, LONGEST, params, stops)
            stopped = ids[-1] in stops
            questions.append(Question(path, fields, tuple(ids[:-1] if stopped else ids), stopped))
    return Exam(questions, encoder)
