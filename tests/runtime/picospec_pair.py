"""A picospec device and cloud in this process, and draft models that agree with the target more or less."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.device.generator import GeneratorConfig
from hat_runtime.device.sampling import SamplingParams, sample
from hat_runtime.device.token_answer import SpeculationConfig
from hat_runtime.device.token_connect import connect_tokens
from hat_runtime.device.token_generator import TokenGenerator
from hat_runtime.emulation.link import emulated_link
from hat_runtime.emulation.spec import LinkSpec


def cloud_config(model: Path, **fields: Any) -> CloudConfig:
    return CloudConfig(
        model, **({"mode": "picospec", "dtype": "float32", "kv_pages": 512, "drain_s": 0.1} | fields)
    )


@asynccontextmanager
async def picospec(
    target: Path,
    draft: Path,
    speculation: SpeculationConfig | None = None,
    *,
    link: str | None = None,
    config: GeneratorConfig | None = None,
    kv_tokens: int = 8192,
    **cloud: Any,
) -> AsyncIterator[tuple[TokenGenerator, RunningCloud]]:
    """Both sides, with or without a slow link. On the way out no page, session or worker is left over."""
    async with running_cloud(cloud_config(target, **cloud)) as running:
        if link is None:
            async with device(target, draft, running, running.address, speculation, config, kv_tokens) as one:
                yield one, running
        else:
            with emulated_link(running.address, LinkSpec.parse(link)) as slow:
                async with device(
                    target, draft, running, slow.address, speculation, config, kv_tokens
                ) as one:
                    yield one, running


@asynccontextmanager
async def device(
    target: Path,
    draft: Path,
    cloud: RunningCloud,
    address: str,
    speculation: SpeculationConfig | None = None,
    config: GeneratorConfig | None = None,
    kv_tokens: int = 8192,
) -> AsyncIterator[TokenGenerator]:
    generator = await connect_tokens(
        target, draft, address, "float32", speculation=speculation, config=config, kv_tokens=kv_tokens
    )
    try:
        yield generator
        generator.conversations.clear()
        await generator.model.call(lambda: generator.model.cache.check([]))
        assert not generator.link.sessions
        async with asyncio.timeout(10):
            while cloud.engine.runner.cache.free_pages < cloud.engine.runner.cache.num_pages:
                await asyncio.sleep(0.01)
        await cloud.engine.idle()
    finally:
        await generator.close()


def perturbed(folder: Path, out: Path, size: float = 0.02) -> Path:
    """The same model with a little noise on its weights: some of its tokens are the target's."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    model.save_pretrained(out)
    for path in folder.glob("tokenizer*"):
        (out / path.name).write_bytes(path.read_bytes())
    return out


class Whole:
    """The whole model by transformers' own forward pass: what plain decoding gives."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def decode(
        self,
        prompt: list[int],
        new: int,
        params: SamplingParams | None = None,
        stop: frozenset[int] = frozenset(),
    ) -> list[int]:
        text = list(prompt)
        cache, ids = None, text
        while len(text) < len(prompt) + new:
            out = self.model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            token = sample(out.logits[0, -1].float(), params or SamplingParams(), len(text))
            text.append(token)
            if token in stop:
                break
            ids = [token]
        return text[len(prompt) :]
