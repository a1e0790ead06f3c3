"""Answering many prompts, several at a time."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from hat_runtime.device.generator import GenerationRequest, GenerationStats, Generator
from hat_runtime.device.sampling import SamplingParams
from hat_runtime.errors import CloudUnavailable, HatError
from hat_runtime.log import request_id

MAX_TRIES = 10
"""Of one prompt, when the cloud is full and says when to come back."""


@dataclass(frozen=True)
class BulkOptions:
    """The same for all prompts."""

    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    concurrency: int = 1
    chunk_tokens: int | None = None
    """None: the generator's default; 0: the whole prompt in one Step."""


@dataclass(frozen=True)
class BulkAnswer:
    """One prompt's answer, the stop token included; or why there is none."""

    token_ids: list[int]
    stats: GenerationStats
    error: str | None = None


async def answer_all(
    generator: Generator, prompts: Sequence[Sequence[int]], options: BulkOptions
) -> AsyncGenerator[BulkAnswer]:
    """Answer `prompts` (token ids), `options.concurrency` at a time; the answers come in the prompts' order.

    A prompt that fails yields an answer with `error`; the others go on. Closing the iterator cancels what is running.
    """
    free = asyncio.Semaphore(options.concurrency)

    async def answer(prompt: Sequence[int]) -> BulkAnswer:
        async with free:
            return await _answer(generator, prompt, options)

    tasks = [asyncio.create_task(answer(prompt)) for prompt in prompts]
    try:
        for task in tasks:
            yield await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(generator: Generator, prompt: Sequence[int], options: BulkOptions) -> BulkAnswer:
    request = GenerationRequest(
        prompt_ids=list(prompt),
        max_new_tokens=options.max_new_tokens,
        sampling=options.sampling,
        stop_ids=generator.model.eos_token_ids,
        request_id=uuid.uuid4().hex,
        chunk_tokens=options.chunk_tokens,
    )
    request_id.set(request.request_id)  # of this task only
    tries = 0
    while True:
        tries += 1
        try:
            token_ids = [event.token_id async for event in generator.generate(request)]
        except CloudUnavailable as error:
            if error.retry_after_s is None or tries >= MAX_TRIES:
                return BulkAnswer([], request.stats, str(error))
            await asyncio.sleep(error.retry_after_s)
        except HatError as error:
            return BulkAnswer([], request.stats, str(error))
        else:
            return BulkAnswer(token_ids, request.stats)
