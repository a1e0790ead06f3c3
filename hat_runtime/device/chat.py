"""From a request's text or messages to token ids, by the model's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from hat_runtime.device.text import Detokenizer
from hat_runtime.errors import UsageError


class PromptEncoder:
    """Tokenises prompts. Safe to use from several threads.

    Args:
        tokenizer: a transformers tokenizer that is backed by the `tokenizers` package.

    Raises:
        ModelError: the tokenizer is written in Python only.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.detokenizer = Detokenizer(tokenizer)
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # Settings of the training, kept in some tokenizer.json files, would cut or pad prompts without a word.
        self._backend.no_truncation()
        self._backend.no_padding()

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` works."""
        return bool(self._tokenizer.chat_template)

    def encode_text(self, text: str) -> list[int]:
        """Plain text -> ids, with the special tokens (BOS) that the model expects in front."""
        # The backend's encode, unlike the tokenizer's call, sets nothing in the shared object.
        ids: list[int] = self._backend.encode(text, add_special_tokens=True).ids
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Messages {"role", "content"} -> ids of the whole conversation and the start of the answer.

        Raises:
            UsageError: the model has no chat template, or its template refuses the messages.
        """
        if not self.has_chat_template:
            raise UsageError(
                "this model has no chat template, so it takes no messages; send its text to /v1/completions"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise UsageError(f"messages: the model's chat template refuses them: {error}") from error
        # The template has written the special tokens already.
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids
