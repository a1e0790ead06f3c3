"""The reference: transformers' own from_pretrained and generate, greedy, on the whole model.

What the split model is compared with, in tokens and in time. Nothing of HAT takes part in it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from hat_runtime.errors import ModelError, UsageError


@dataclass(frozen=True)
class LocalAnswer:
    """What generate gave, the stop token included, and when."""

    token_ids: list[int]
    text: str
    """Without special tokens."""
    ttft_s: float
    tbt_s: float
    """Mean time between tokens; 0 with fewer than two."""


class LocalModel:
    """A whole model in this process."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        """Load it.

        Raises:
            ModelError: transformers cannot load the folder.
        """
        transformers_logging.disable_progress_bar()  # a second bar beside the caller's
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            self.model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True
            ).eval()
        except (OSError, ValueError) as error:
            raise ModelError(f"transformers cannot load {folder}: {error}") from error
        finally:
            transformers_logging.enable_progress_bar()
        # Only the stop tokens count: a folder's own sampling settings or penalties would not be greedy decoding.
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            eos_token_id=self.model.generation_config.eos_token_id,
            pad_token_id=self.model.generation_config.pad_token_id,
        )
        eos = self.model.generation_config.eos_token_id
        self.eos_token_ids = frozenset(eos if isinstance(eos, list) else [eos])
        self.context_length = int(self.model.config.max_position_embeddings)

    def encode(self, text: str, chat: bool) -> list[int]:
        """Token ids of a user message through the chat template, or of plain text.

        Raises:
            UsageError: a message, but the model has no chat template.
        """
        if not chat:
            return list(self.tokenizer(text).input_ids)
        if not self.tokenizer.chat_template:
            raise UsageError("this model has no chat template, which chat prompts need")
        message = [{"role": "user", "content": text}]
        encoded = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int) -> LocalAnswer:
        """Continue a prompt greedily until a stop token or `max_new_tokens`.

        Raises:
            UsageError: prompt and answer together exceed the context.
        """
        if len(prompt_ids) + max_new_tokens > self.context_length:
            raise UsageError(
                f"the prompt has {len(prompt_ids)} tokens and {max_new_tokens} new ones are asked for, "
                f"but the context is {self.context_length}"
            )
        clock = _Clock()
        ids = torch.tensor([list(prompt_ids)])
        began = time.monotonic()
        with torch.inference_mode():
            output = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=clock
            )
        new = output[0, len(prompt_ids) :].tolist()
        times = clock.times
        return LocalAnswer(
            token_ids=new,
            text=self.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            ttft_s=times[0] - began,
            tbt_s=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0,
        )


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when each token came; generate hands it the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """One token, or first of all the prompt."""
        if self._prompt_seen:
            self.times.append(time.monotonic())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing to do."""
