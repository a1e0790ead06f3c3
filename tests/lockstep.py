"""A device and its cloud in one process and in step: for tests that need hundreds of thousands of short answers.

Everything of the device is real, sessions with their epochs and rollbacks included, and so are the cloud's layers over
a paged KV cache. Left out are gRPC and the cloud's scheduler, which cost most of the time of a short answer and are
tested elsewhere. The cloud computes when no session of the device has anything to do: every session drafts ahead as
far as its policy lets it, whatever the machine does meanwhile, and passes are as large as they can be.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hat_runtime.control.drafting import RoundTimes
from hat_runtime.device.chain import DraftPlan, Speculation
from hat_runtime.device.drafting.factory import drafter_maker
from hat_runtime.device.generator import Generator, GeneratorConfig
from hat_runtime.device.jobs import Turn
from hat_runtime.device.link import CloudLink
from hat_runtime.device.policy import DraftConfig
from hat_runtime.device.session import CloudSession
from hat_runtime.device.steps import ALL, LAST, Binding, Step
from hat_runtime.device.submodels import DeviceModel
from hat_runtime.model.attention import make_backend
from hat_runtime.model.hf import load_decoder_slice, num_layers
from hat_runtime.model.manifest import identity
from hat_runtime.model.pages import PagedSequence
from hat_runtime.model.runner import LayerRunner, Segment, make_cache
from hat_runtime.model.split import LayerRange
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb

_LIMITS = pb.Limits(max_tokens=256, max_step_tokens=256, max_inflight_steps=32)


class PatientTimes(RoundTimes):
    """A link so slow that drafting ahead always has time left: what is drafted does not depend on the machine."""

    def __init__(self) -> None:
        super().__init__(draft_s=1e-3, wait_s=1.0)

    def saw_wait(self, seconds: float) -> None:
        """It stays as it is."""

    def saw_draft(self, seconds: float) -> None:
        """It stays as it is."""

    def steps_left(self, elapsed_s: float) -> int:
        """Always enough for a round's drafts."""
        return 8


@dataclass(eq=False)
class _Held:
    """What the cloud knows of a session."""

    sequence: PagedSequence
    queue: deque[Step]
    epoch: int = 0


class LockstepLink(CloudLink):
    """Sessions whose Steps are computed by `tick`."""

    def __init__(self, runner: LayerRunner) -> None:
        super().__init__("127.0.0.1:9")  # nothing is ever sent there
        self.limits = _LIMITS
        self.runner = runner
        self.passes = 0
        self.busy = 0
        """Turns that the device is at."""
        self._held: dict[CloudSession, _Held] = {}
        self._due = False

    def open_session(self, binding: Binding, **_: Any) -> CloudSession:
        """See CloudLink."""
        session = _Session(self, None, binding)  # type: ignore[arg-type]
        session.takes_alternatives = True
        self.sessions.add(session)
        session.open(pb.Open(), self.limits, self.timeout_s)
        self._held[session] = _Held(PagedSequence(), deque())
        return session

    def arrived(self, session: CloudSession, step: Step) -> None:
        """A Step has reached the cloud."""
        held = self._held[session]
        held.queue.append(step)
        held.epoch = max(held.epoch, step.epoch)
        self.look()

    def look(self) -> None:
        """Compute soon, unless the device is at work."""
        if not self._due and not self.busy:
            self._due = True
            asyncio.get_running_loop().call_soon(self._tick)

    def forget(self, session: CloudSession) -> None:
        """See CloudLink."""
        super().forget(session)
        if (held := self._held.pop(session, None)) is not None:
            self.runner.cache.release(held.sequence)

    def _tick(self) -> None:
        self._due = False
        if self.busy:
            return
        work = [(session, held, held.queue.popleft()) for session, held in self._held.items() if held.queue]
        if not work:
            return
        self.passes += 1
        live = [one for one in work if one[2].epoch == one[1].epoch]
        segments = [
            Segment(held.sequence, step.start, step.hidden, aside=step.alternatives) for _, held, step in live
        ]
        rows_of_pass = sum(len(step.hidden) for _, _, step in live)
        deep = iter(self.runner.run(segments) if live else [])
        for session, held, step in work:
            rows = torch.empty(0)
            if step.epoch == held.epoch:
                rows = next(deep)
                rows = rows if step.want == ALL else rows[-1:] if step.want == LAST else rows[:0]
            result = pb.Result(
                epoch=step.epoch,
                start_pos=step.start,
                n=step.n,
                status=pb.STATUS_OK if step.epoch == held.epoch else pb.STATUS_STALE,
                payload=step.codec.encode(rows) if rows.numel() else b"",
                batch_tokens=rows_of_pass,
            )
            session._receive_result(result)
        if any(held.queue for held in self._held.values()):
            self.look()


class _Session(CloudSession):
    """A session whose other end is a LockstepLink."""

    async def _write_all(self) -> None:
        self._opened.set_result(None)
        assert isinstance(self.link, LockstepLink)
        while True:
            self._extra.clear()
            while self._unsent:
                self.link.arrived(self, self._unsent.popleft())
            self._wake_writer.clear()
            await self._wake_writer.wait()

    async def _read_all(self) -> None:
        await asyncio.Event().wait()

    def close(self, error: Any = None) -> None:
        """See CloudSession."""
        self._end_with(error or Exception("closed"))
        self._reader.cancel()


class _Model(DeviceModel):
    """Tells the link when it is at work, and keeps count of what it did."""

    link: LockstepLink
    seen: Counter[str]

    async def turn(
        self, speculation: Speculation, deep: torch.Tensor | None, plan: DraftPlan, **rest: Any
    ) -> Turn:
        """See DeviceModel."""
        self.link.busy += 1
        try:
            turn = await super().turn(speculation, deep, plan, **rest)
        finally:
            self.link.busy -= 1
            self.link.look()
        accepted = [draft for draft, right in turn.judged if right]
        self.seen.update(f"{draft.source} accepted" for draft in accepted)
        self.seen.update(f"{draft.source} refused" for draft, right in turn.judged if not right)
        self.seen["bonus"] += turn.fresh and not turn.refused and bool(turn.judged)
        self.seen["branch hit"] += turn.hit
        self.seen["alternative"] += turn.alternative
        self.seen["drafted ahead"] += deep is None and bool(turn.drafts)
        self.seen["all accepted"] += deep is not None and len(deep) > 1 and not turn.fresh
        return turn


@asynccontextmanager
async def lockstep(
    folder: Path,
    input_layers: int,
    drafter: str,
    config: DraftConfig,
    *,
    sessions: int,
    patient: bool = True,
) -> AsyncIterator[tuple[Generator, Counter[str]]]:
    """A generator for up to `sessions` requests at a time, and what was seen of its turns.

    Args:
        folder: a whole model.
        input_layers: m.
        drafter: as --drafter names it.
        config: how to draft.
        sessions: requests at a time.
        patient: with times that never change (PatientTimes).
    """
    dtype, kv_tokens = torch.float32, sessions * 64
    layers = load_decoder_slice(folder, LayerRange(input_layers, num_layers(folder)), dtype)
    cache = make_cache(layers, num_pages=kv_tokens // 16, page_tokens=16)
    link = LockstepLink(LayerRunner(layers, cache, make_backend("sdpa")))
    weights_id = identity(folder).weights_id
    maker = drafter_maker(drafter, folder, weights_id, input_layers, dtype, kv_tokens=kv_tokens)
    model = _Model.load(folder, input_layers, dtype, kv_tokens=kv_tokens, make_drafter=maker)
    assert isinstance(model, _Model)
    model.link, model.seen = link, Counter()
    binding = Binding("", LayerRange(input_layers, num_layers(folder)), dtype, model.hidden_size)
    policies = GeneratorConfig(max_idle_conversations=sessions, min_reuse_tokens=1, drafting=config)
    generator = Generator(model, link, binding, policies)
    if patient:
        generator.policy.times = PatientTimes()
    try:
        yield generator, model.seen
        generator.conversations.clear()
        await model.call(lambda: model.cache.check([]))
        cache.check([])
        await model.call(lambda: check_drafter(model))
    finally:
        await generator.close()


def check_drafter(model: DeviceModel) -> None:
    """Raise if the drafter holds KV pages, when no conversation is left."""
    inner: Sequence[Any] = (model.drafter, getattr(model.drafter, "_network", None))
    for drafter in inner:
        if (pages := getattr(drafter, "_cache", None)) is not None:
            pages.check([])
