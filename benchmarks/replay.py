"""What a device sends for its answers, recorded once with a real cloud, to be sent again as a load."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from common import data_prompts

from hat_runtime.control.pass_cost import PassCost
from hat_runtime.data import read_prompts
from hat_runtime.device.chat import PromptEncoder
from hat_runtime.device.chunking import ChunkConfig
from hat_runtime.device.connect import connect
from hat_runtime.device.generator import GenerationRequest, GeneratorConfig
from hat_runtime.device.policy import DraftConfig
from hat_runtime.device.session import CloudSession
from hat_runtime.device.steps import Binding, StepResult, Want
from hat_runtime.model.hf import load_tokenizer

GAMMA, ETA = 6, 0.6
MOST_PROMPT_TOKENS = 512


@dataclass(frozen=True)
class Sent:
    """One Step of a recorded answer."""

    start: int
    hidden: torch.Tensor
    """Shallow states [n, hidden_size]."""
    want: Want
    decode: bool
    alternatives: tuple[int, ...]


@dataclass
class Recording:
    """What a device sent for one answer."""

    steps: list[Sent] = field(default_factory=list)
    tokens: int = 0
    rounds: int = 0


@dataclass(frozen=True)
class Recorded:
    """Answers of one device."""

    binding: Binding
    answers: list[Recording]
    shallow: PassCost | None
    """What the device's input passes cost it; None: too few of them."""
    draft_s: float
    """One draft and its input pass; 0: none was made."""


async def record(
    folder: Path,
    address: str,
    prompts: Sequence[Sequence[int]],
    dtype: str,
    drafter: str,
    max_new_tokens: int,
    alternatives: int | None = None,
) -> Recorded:
    """Answer prompts with a real device, one after the other, and keep what it sends.

    Args:
        folder: the model.
        address: "HOST:PORT" of the cloud.
        prompts: token ids of each.
        dtype: "bfloat16" or "float32".
        drafter: as for `hat device serve`.
        max_new_tokens: of each answer.
        alternatives: of each draft; None: as many as pay.
    """
    # A round waits for its drafts and for its Result: what is sent depends on nothing but the text.
    drafting = DraftConfig(GAMMA, ETA, 1, 0, alternatives, adaptive=False)
    config = GeneratorConfig(chunking=ChunkConfig(128), max_idle_conversations=0, drafting=drafting)
    generator = await connect(folder, address, dtype, config=config, drafter=drafter)
    recordings = []
    try:
        for ids in prompts:
            recording = Recording()
            request = GenerationRequest(list(ids), max_new_tokens)
            with _noting(recording):
                recording.tokens = len([event async for event in generator.generate(request)])
            recording.rounds = request.stats.rounds
            recordings.append(recording)
        draft_s = generator.policy.times.draft_s
        return Recorded(generator.binding, recordings, generator.model.shallow_cost, draft_s)
    finally:
        await generator.close()


def encoded_prompts(folder: Path, file: Path | None, limit: int) -> list[list[int]]:
    """Token ids of `limit` prompts, taken evenly from a file (default Spec-Bench), at most MOST_PROMPT_TOKENS each."""
    encoder = PromptEncoder(load_tokenizer(folder))
    prompts = read_prompts(file) if file else data_prompts("spec_bench.jsonl")
    chosen = prompts[:: max(1, len(prompts) // limit)][:limit]
    encoded = [encoder.encode_chat([{"role": "user", "content": prompt.text}]) for prompt in chosen]
    return [ids[-MOST_PROMPT_TOKENS:] for ids in encoded]


def _noting(recording: Recording) -> AbstractContextManager[object]:
    """While it is entered, every Step that is submitted in this process is noted."""
    submit = CloudSession.submit

    def submit_and_note(
        session: CloudSession,
        start: int,
        hidden: torch.Tensor,
        want: Want,
        *rest: str,
        decode: bool = False,
        alternatives: tuple[int, ...] = (),
    ) -> asyncio.Future[StepResult]:
        recording.steps.append(Sent(start, hidden.clone(), want, decode, alternatives))
        return submit(session, start, hidden, want, *rest, decode=decode, alternatives=alternatives)

    return mock.patch.object(CloudSession, "submit", submit_and_note)
