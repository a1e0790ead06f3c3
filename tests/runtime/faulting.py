"""Faults of the cloud, of the link and of the device in the middle of answers: what strikes, and what must come of it.

The cloud is `hat cloud serve` in a process of its own, behind an emulated link; the device is in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hat_runtime.cli.processes import Child, Children, free_address
from hat_runtime.device.chunking import ChunkConfig
from hat_runtime.device.connect import connect
from hat_runtime.device.generator import GenerationRequest, Generator, GeneratorConfig
from hat_runtime.device.policy import DraftConfig
from hat_runtime.device.recovery import CONNECTION, DRAIN, SESSION, RecoveryConfig
from hat_runtime.device.refusals import CloudRefused
from hat_runtime.device.sampling import SamplingParams
from hat_runtime.device.token_answer import SpeculationConfig
from hat_runtime.device.token_connect import connect_tokens
from hat_runtime.emulation.link import EmulatedLink, emulated_link
from hat_runtime.emulation.spec import LinkSpec
from hat_runtime.errors import CloudOverloaded
from tests.runtime.picospec_pair import Whole
from tests.tiny_drafters import INPUT_LAYERS, PROMPTS

LINK = "100mbit,20ms"
NEW = 24
CHUNK = 4
SAMPLINGS = (SamplingParams(), SamplingParams(0.8, seed=11), SamplingParams(1.3, 0.8, seed=12))
DRAFTING = DraftConfig(4, window=None, branches=2, adaptive=False)
SPECULATION = SpeculationConfig(4, window=2, ahead=1, adaptive=False)
TTL_S = 3.0
READY_S = 120.0
GONE_S = 30.0
"""For what is left over to go: sessions whose device could not say that it wants them no more are kept for TTL_S."""
PAGE_TOKENS = 4

Want = Callable[[GenerationRequest], list[int]]


@dataclass
class Outcome:
    """What came of an answer."""

    request: GenerationRequest
    got: list[int] = field(default_factory=list)
    error: Exception | None = None


@dataclass
class Scene:
    """A device, a cloud that can be killed, and the link between them."""

    mode: str
    model: Path
    orders: Path
    children: Children
    address: str
    admin: str
    options: tuple[str, ...]
    link: EmulatedLink
    cloud: Child = field(init=False)
    generator: Generator = field(init=False)

    def start_cloud(self) -> None:
        """Start it, on the same ports as the one before."""
        mode = ["--mode", "picospec"] if self.mode == "picospec" else ["--input-layers", str(INPUT_LAYERS)]
        command = [sys.executable, "-m", "tests.runtime.faulty_cloud", "cloud", "serve", *mode]
        command += ["--model", str(self.model), "--dtype", "float32", "--page-tokens", str(PAGE_TOKENS)]
        command += ["--listen", self.address, "--http-listen", self.admin]
        command += ["--resume-ttl", str(TTL_S), "--drain", "0.05", "--watchdog", "4", *self.options]
        self.cloud = self.children.start("cloud", command, env={"HAT_FAULT_FILE": str(self.orders)})

    async def ready(self) -> None:
        """Wait until the cloud serves."""
        await asyncio.to_thread(self.cloud.wait_ready, f"http://{self.admin}/readyz", READY_S)

    async def ended(self) -> int:
        """Wait until the cloud has ended by itself; its exit code."""
        await asyncio.to_thread(self.cloud.wait, READY_S)
        code = self.cloud.exit_code
        assert code is not None
        return code

    def order(self, what: str) -> None:
        """For the cloud's next pass: see faulty_cloud.py."""
        draft = self.orders.with_suffix(".draft")
        draft.write_text(what)
        draft.rename(self.orders)

    def recoveries(self) -> Counter[str]:
        """By cause, so far."""
        value = self.generator.metrics.registry.get_sample_value
        causes = (CONNECTION, SESSION, DRAIN)
        return Counter(
            {cause: int(value("hat_session_resumes_total", {"cause": cause}) or 0) for cause in causes}
        )

    async def answer(self, request: GenerationRequest) -> Outcome:
        """All that a caller gets."""
        outcome = Outcome(request)
        try:
            async for event in self.generator.generate(request):
                outcome.got.append(event.token_id)
        except Exception as error:
            outcome.error = error
        return outcome

    async def struck(self, fault: Fault, requests: list[GenerationRequest]) -> list[Outcome]:
        """Answer requests at the same time, with the fault when a quarter of all tokens is there."""
        answers = [asyncio.create_task(self.answer(request)) for request in requests]
        enough = sum(request.max_new_tokens for request in requests) // 4
        while sum(request.stats.completion_tokens for request in requests) < enough:
            assert not all(answer.done() for answer in answers), "the answers ended before the fault"
            await asyncio.sleep(0.001)
        with fault.during():
            await fault.strike(self)
            return await asyncio.gather(*answers)

    async def nothing_is_left(self) -> None:
        """No session and no page, on either side. Raises TimeoutError, with what is left."""
        generator = self.generator
        generator.conversations.clear()
        await generator.model.call(lambda: generator.model.cache.check([]))
        until = time.monotonic() + GONE_S
        while True:
            left = {"device": len(generator.link.sessions)} | await asyncio.to_thread(self._left_in_cloud)
            if not any(left.values()):
                return
            if time.monotonic() > until:
                raise TimeoutError(f"left over: {left}")
            await asyncio.sleep(0.05)

    def _left_in_cloud(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://{self.admin}/metrics", timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        names = ("hat_kv_cache_usage_ratio", "hat_num_sessions_open", "hat_num_sessions_lost")
        found = {line.split()[0]: float(line.split()[1]) for line in lines if line.split()[0] in names}
        assert len(found) == len(names)
        return found


async def _kill(scene: Scene) -> None:
    os.kill(scene.cloud.pid, signal.SIGKILL)
    await scene.ended()
    scene.start_cloud()


async def _drain(scene: Scene) -> None:
    os.kill(scene.cloud.pid, signal.SIGTERM)
    assert await scene.ended() == 0
    scene.start_cloud()


async def _hang(scene: Scene) -> None:
    scene.order("hang")
    assert await scene.ended() == 1
    assert "the engine is stuck" in scene.cloud.output()
    scene.start_cloud()


async def _flap(scene: Scene) -> None:
    scene.link.drop(0.05)
    await asyncio.sleep(3.0)
    scene.link.drop(0)


async def _past_ttl(scene: Scene) -> None:
    scene.link.outage(TTL_S + 1.0)
    await asyncio.sleep(0)


async def _clock(scene: Scene) -> None:
    scene.order("clock")
    real = time.time
    time.time = lambda: real() - 86_400.0  # back on the device, forward in the cloud


@contextlib.contextmanager
def _clock_back() -> Iterator[None]:
    real = time.time
    try:
        yield
    finally:
        time.time = real


@contextlib.contextmanager
def _full_disk() -> Iterator[None]:
    """All that the device writes is its log: every line of it fails with ENOSPC."""
    root, before = logging.getLogger(), logging.getLogger().level
    raises, logging.raiseExceptions = (
        logging.raiseExceptions,
        False,
    )  # as it is said on standard error otherwise
    full = Path("/dev/full").open("w")  # noqa: SIM115 (its close fails)
    handler = logging.StreamHandler(full)
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
        logging.raiseExceptions = raises
        with contextlib.suppress(OSError):
            full.close()


def _does(act: Callable[[Scene], None]) -> Callable[[Scene], Awaitable[None]]:
    async def strike(scene: Scene) -> None:
        act(scene)

    return strike


@dataclass(frozen=True)
class Fault:
    """Something that strikes, and what the contract says of the answers."""

    strike: Callable[[Scene], Awaitable[None]]
    cause: str | None = None
    """Of recoveries that must be seen; None: there need be none."""
    errors: tuple[type[Exception], ...] = ()
    """With which answers may end instead; the text before is right all the same."""
    most_errors: int | None = None
    """Answers that may; None: any."""
    options: tuple[str, ...] = ()
    """Of the cloud."""
    during: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


FAULTS: dict[str, Fault] = {
    "kill -9 of the cloud": Fault(_kill, SESSION),
    "SIGTERM, drain": Fault(_drain, DRAIN),
    "link cut": Fault(_does(lambda scene: scene.link.cut()), CONNECTION),
    "link away for 1 s": Fault(_does(lambda scene: scene.link.outage(1.0)), CONNECTION),
    "link away for longer than the TTL": Fault(_past_ttl, SESSION),
    "half-open connection": Fault(_does(lambda scene: scene.link.freeze()), CONNECTION),
    "stall of 2 s": Fault(_does(lambda scene: scene.link.stall(2.0))),
    "5 % of connections dropped every 100 ms": Fault(_flap),
    "page exhaustion": Fault(
        _does(lambda scene: None),
        errors=(CloudOverloaded,),
        options=("--kv-memory", "0.000125"),  # 128 tokens, where each text has up to 40
    ),
    "a pass raises once": Fault(_does(lambda scene: scene.order("raise"))),
    "a session poisons its passes": Fault(
        _does(lambda scene: scene.order("poison")), errors=(CloudRefused,), most_errors=1
    ),
    "a pass never ends": Fault(_hang, SESSION),
    "clocks jump by a day": Fault(_clock, during=_clock_back),
    "the device's disk is full": Fault(_does(lambda scene: scene.link.cut()), CONNECTION, during=_full_disk),
}
LONG_ONLY: dict[str, Fault] = {
    "link away for 30 s": Fault(
        _does(lambda scene: scene.link.outage(30.0)), CONNECTION, options=("--resume-ttl", "60")
    ),
}


def whole_text(model: Path) -> Want:
    """What the whole model says, by transformers alone."""
    whole = Whole(model)

    @cache
    def decode(prompt: tuple[int, ...], new: int, sampling: SamplingParams) -> list[int]:
        return whole.decode(list(prompt), new, sampling)

    return lambda request: decode(tuple(request.prompt_ids), request.max_new_tokens, request.sampling)


def ask(count: int) -> list[GenerationRequest]:
    """Different prompts, greedy and seeded in turn."""
    return [
        GenerationRequest(PROMPTS[n % len(PROMPTS)], NEW, SAMPLINGS[n % len(SAMPLINGS)], chunk_tokens=CHUNK)
        for n in range(count)
    ]


@asynccontextmanager
async def scene(mode: str, model: Path, drafter: str, options: tuple[str, ...] = ()) -> AsyncIterator[Scene]:
    """Both sides, ready; `drafter` is --drafter of mode hat, or the draft model's folder of mode picospec."""
    with contextlib.ExitStack() as stack:
        children = stack.enter_context(Children())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        address, admin = free_address(), free_address()
        link = stack.enter_context(emulated_link(address, LinkSpec.parse(LINK)))
        made = Scene(mode, model, folder / "order", children, address, admin, options, link)
        made.start_cloud()
        await made.ready()
        config = GeneratorConfig(
            chunking=ChunkConfig(32),
            drafting=DRAFTING,
            max_idle_conversations=32,
            recovery=RecoveryConfig(reconnect_for_s=90.0, max_recoveries=60, keepalive_s=1.0),
        )
        common: dict[str, Any] = {"config": config, "page_tokens": PAGE_TOKENS, "kv_tokens": 8192}
        if mode == "picospec":
            made.generator = await connect_tokens(
                model, Path(drafter), link.address, "float32", speculation=SPECULATION, **common
            )
        else:
            made.generator = await connect(model, link.address, "float32", drafter=drafter, **common)
        try:
            yield made
        finally:
            await made.generator.close()


@dataclass
class Tally:
    """What came of a fault."""

    exact: int = 0
    told: int = 0
    """Ended with an error that the contract allows; what came before it was right."""
    wrong: list[str] = field(default_factory=list)
    recoveries: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


async def strike(there: Scene, name: str, fault: Fault, want: Want, count: int) -> Tally:
    """Answers under a fault, then what is left, then answers without one."""
    tally, before, began = Tally(), there.recoveries(), time.monotonic()
    for outcome in await there.struck(fault, ask(count)):
        expected = want(outcome.request)
        if outcome.error is None and outcome.got == expected:
            tally.exact += 1
        elif isinstance(outcome.error, fault.errors) and outcome.got == expected[: len(outcome.got)]:
            tally.told += 1
        else:
            tally.wrong.append(f"{len(outcome.got)} of {len(expected)} tokens, {outcome.error!r}")
    tally.seconds = time.monotonic() - began
    tally.recoveries = there.recoveries() - before
    if fault.cause is not None and not tally.recoveries[fault.cause]:
        tally.wrong.append(f"no recovery with cause {fault.cause}: {dict(tally.recoveries)}")
    if fault.most_errors is not None and tally.told > fault.most_errors:
        tally.wrong.append(f"{tally.told} answers ended with an error, at most {fault.most_errors} may")
    await there.ready()
    try:
        await there.nothing_is_left()
    except (TimeoutError, RuntimeError) as error:
        tally.wrong.append(f"{name}: {error}")
    for outcome in await asyncio.gather(*map(there.answer, ask(2))):
        if outcome.error is not None or outcome.got != want(outcome.request):
            tally.wrong.append(f"{name}: an answer after the fault: {outcome.error!r}")
    return tally
