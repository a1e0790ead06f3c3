"""The state machine of sessions against a model of it, with a real engine, service and gRPC server and a tiny model:
open, step, truncate, lose, resume, fence, expire, close in any order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prometheus_client import CollectorRegistry

from hat_runtime.cloud.admission import Admission, AdmissionConfig
from hat_runtime.cloud.devices import DeviceTable
from hat_runtime.cloud.engine import Engine, EngineConfig
from hat_runtime.cloud.handshake import Served
from hat_runtime.cloud.metrics import CloudMetrics
from hat_runtime.cloud.server import RuntimeService, make_server
from hat_runtime.control.quotas import Quotas
from hat_runtime.model.runner import make_cache
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.proto.hat.v1 import runtime_pb2_grpc as rpc
from tests.runtime.raw_client import LocalSplit, RawSession, states

PAGE_TOKENS, PAGES, LOST_PAGES = 4, 64, 12
MOST_TOKENS = 40
ROWS = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
PEERS = ("a", "b")
T = TypeVar("T")


@dataclass(eq=False)
class Modelled:
    """A session as it should be."""

    id: str
    tenant: str
    stream: RawSession
    rows: list[int] = field(default_factory=list)
    """What its KV cache holds, as indices of ROWS."""
    lost: bool = False
    unsure: bool = False
    """A Step was under way when the stream was lost: the cache holds `rows`, and may hold more."""
    epoch: int = 0

    @property
    def pages(self) -> int:
        return -(-len(self.rows) // PAGE_TOKENS)


class Sessions(RuleBasedStateMachine):
    """`local` is set by the test."""

    local: LocalSplit

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.sessions: list[Modelled] = []
        self.lost: list[Modelled] = []  # in the order in which their streams were lost
        self.next_row = 0
        self.run(self._start())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 30))

    async def _start(self) -> None:
        runner = self.local.runners[1]
        runner.cache = make_cache(runner.layers, num_pages=PAGES, page_tokens=PAGE_TOKENS)  # type: ignore[arg-type]
        metrics = CloudMetrics(CollectorRegistry())
        config = EngineConfig(lost_share=LOST_PAGES / PAGES)
        self.engine = Engine(runner, config, metrics, self.loop)
        identity = pb.ModelIdentity(model_revision="r", lo=2, hi=6, dtype="float32", hidden_size=64)
        limits = pb.Limits(
            max_tokens=MOST_TOKENS, max_step_tokens=64, max_frame_bytes=1 << 19, max_inflight_steps=8,
            max_sessions=16,
        )  # fmt: skip
        bounds = AdmissionConfig(limits.max_sessions, PAGES * PAGE_TOKENS, PAGE_TOKENS, idle_after_s=60.0)
        self.admission = Admission(bounds, metrics, Quotas, lambda: None)
        served = Served(identity, limits)
        self.service = RuntimeService(self.engine, served, metrics, DeviceTable(), self.admission)
        self.server = make_server(self.service)
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.engine.start()
        await self.server.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self.stub: Any = rpc.RuntimeStub(self.channel)  # type: ignore[no-untyped-call]

    def teardown(self) -> None:
        async def stop() -> None:
            for session in self.sessions:
                session.stream.call.cancel()
            self.service.drain(0.0)
            await self.channel.close()
            await self.server.stop(0)
            await self._until(lambda: not self.service._sessions)
            await self.engine.idle()
            assert self.engine.runner.cache.free_pages == PAGES
            assert not self.engine._sessions
            assert not self.admission._places
            self.engine.stop()

        self.run(stop())
        self.loop.close()

    # What a device does

    async def _open(self, tenant: str, resume: str = "") -> tuple[RawSession, pb.Opened | None]:
        stream = RawSession(self.stub.Session())
        opening = pb.Open(
            model_revision="r", lo=2, hi=6, dtype="float32", codec="raw", tenant=tenant, resumable=True
        )
        if resume:
            opening.resume.session_id = resume
        await stream.send(pb.DeviceMessage(open=opening))
        try:
            message = await stream.call.read()
        except grpc.aio.AioRpcError:
            return stream, None
        return stream, None if message is grpc.aio.EOF else message.opened

    def _new_rows(self, n: int) -> list[int]:
        first, self.next_row = self.next_row, self.next_row + n
        return [row % len(ROWS) for row in range(first, first + n)]

    async def _step(self, session: Modelled, start: int, rows: list[int]) -> None:
        session.epoch += 1
        await session.stream.step(start, ROWS[rows], pb.WANT_ALL, epoch=session.epoch)
        result = await session.stream.result()
        assert result.status == pb.STATUS_OK
        session.rows, session.unsure = [*session.rows[:start], *rows], False
        expected = self.local.deep(ROWS[session.rows])[start:]
        torch.testing.assert_close(states(result), expected, atol=1e-4, rtol=1e-4)

    async def _until(self, reached: Any) -> None:
        while not reached():
            await asyncio.sleep(0.001)

    async def _lose(self, session: Modelled) -> None:
        session.stream.call.cancel()
        await self._until(lambda: session.id in self.service._lost._lost)
        await self.engine.idle()
        session.lost = True
        self.lost.append(session)
        for first in list(self.lost):  # over their share, those lost first give theirs up
            if (
                sum(self.engine._sessions[one.id].sequence.length > 0 and one.pages for one in self.lost)
                <= LOST_PAGES
            ):
                break
            first.rows, first.unsure = [], False

    def _pick(self, data: st.DataObject, lost: bool | None = None) -> Modelled:
        fitting = [one for one in self.sessions if lost is None or one.lost is lost]
        return data.draw(st.sampled_from(fitting), label="session")

    def _gone(self, session: Modelled) -> None:
        self.sessions.remove(session)
        if session in self.lost:
            self.lost.remove(session)

    # Rules

    @initialize()
    def one(self) -> None:
        self.opens("a")

    @precondition(lambda self: len(self.sessions) < 5)
    @rule(tenant=st.sampled_from(PEERS))
    def opens(self, tenant: str) -> None:
        stream, opened = self.run(self._open(tenant))
        assert opened is not None
        assert opened.committed == 0
        assert opened.session_id not in {one.id for one in self.sessions}
        self.sessions.append(Modelled(opened.session_id, tenant, stream))

    @precondition(lambda self: len(self.sessions) > len(self.lost))
    @rule(data=st.data(), n=st.integers(1, 9), back=st.integers(0, 12))
    def steps(self, data: st.DataObject, n: int, back: int) -> None:
        """At the end, or before it, which truncates."""
        session = self._pick(data, lost=False)
        start = max(0, len(session.rows) - back)
        self.run(self._step(session, start, self._new_rows(min(n, MOST_TOKENS - start) or 1)) if start < MOST_TOKENS
                 else asyncio.sleep(0))  # fmt: skip

    @precondition(lambda self: len(self.sessions) > len(self.lost))
    @rule(data=st.data())
    def jumps_forward(self, data: st.DataObject) -> None:
        """A violation: the session is over, and cannot be resumed."""
        session = self._pick(data, lost=False)
        if session.unsure:
            return

        async def jump() -> None:
            await session.stream.step(len(session.rows) + 1, ROWS[:1], pb.WANT_ALL, epoch=session.epoch)
            assert (await session.stream.end())[0] is grpc.StatusCode.INVALID_ARGUMENT
            stream, opened = await self._open(session.tenant, session.id)
            assert opened is None
            assert (await stream.end())[0] is grpc.StatusCode.NOT_FOUND

        self.run(jump())
        self._gone(session)

    @precondition(lambda self: len(self.sessions) > len(self.lost))
    @rule(data=st.data())
    def loses(self, data: st.DataObject) -> None:
        self.run(self._lose(self._pick(data, lost=False)))

    @precondition(lambda self: len(self.sessions) > len(self.lost))
    @rule(data=st.data(), n=st.integers(1, 6), back=st.integers(0, 6))
    def loses_with_a_step_under_way(self, data: st.DataObject, n: int, back: int) -> None:
        """Whether it ran, nobody knows: all before its start is sure."""
        session = self._pick(data, lost=False)
        start = max(0, min(len(session.rows), MOST_TOKENS - n) - back)

        async def lose() -> None:
            session.epoch += 1
            await session.stream.step(start, ROWS[:n], pb.WANT_ALL, epoch=session.epoch)
            del session.rows[start:]
            session.unsure = True
            await self._lose(session)

        self.run(lose())

    @precondition(lambda self: self.lost)
    @rule(data=st.data())
    def resumes(self, data: st.DataObject) -> None:
        session = self._pick(data, lost=True)
        self._take(session)
        self.lost.remove(session)

    @precondition(lambda self: len(self.sessions) > len(self.lost))
    @rule(data=st.data(), n=st.integers(0, 3))
    def fences(self, data: st.DataObject, n: int) -> None:
        """A resume of a live session: Steps that the old stream still sends change nothing."""
        session = self._pick(data, lost=False)
        old, epoch = session.stream, session.epoch + 100
        self._take(session)

        async def late() -> None:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                for _ in range(n):
                    await old.step(0, ROWS[:2], pb.WANT_ALL, epoch=epoch)
            assert (await old.end())[0] is grpc.StatusCode.ABORTED

        self.run(late())

    def _take(self, session: Modelled) -> None:
        stream, opened = self.run(self._open(session.tenant, session.id))
        assert opened is not None
        assert opened.session_id == session.id
        if session.unsure:
            assert opened.committed >= len(session.rows) or opened.committed == 0
            del session.rows[opened.committed :]
        else:
            assert opened.committed == len(session.rows)
        session.stream, session.lost, session.epoch = stream, False, 0

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def another_peer_tries(self, data: st.DataObject) -> None:
        session = self._pick(data)
        other = PEERS[session.tenant == PEERS[0]]

        async def attempt() -> None:
            stream, opened = await self._open(other, session.id)
            assert opened is None
            assert (await stream.end())[0] is grpc.StatusCode.NOT_FOUND

        self.run(attempt())

    @precondition(lambda self: self.lost)
    @rule(data=st.data())
    def expires(self, data: st.DataObject) -> None:
        session = self._pick(data, lost=True)
        self.loop.call_soon(self.service._lost._expire, session.id)  # what its timer does
        self.run(asyncio.sleep(0))
        self._gone(session)

    @precondition(lambda self: len(self.sessions) > len(self.lost))
    @rule(data=st.data(), busy=st.booleans())
    def closes(self, data: st.DataObject, busy: bool) -> None:
        session = self._pick(data, lost=False)

        async def close() -> None:
            if busy:
                await session.stream.step(0, ROWS[:5], pb.WANT_ALL, epoch=session.epoch + 1)
            await session.stream.send(pb.DeviceMessage(close=pb.Close()))
            assert (await session.stream.end())[0] is grpc.StatusCode.OK
            await self._until(lambda: session.id not in self.service._sessions)

        self.run(close())
        self._gone(session)

    @invariant()
    def holds(self) -> None:
        self.run(self.engine.idle())  # free + owned == total, and no page has two owners
        found = self.engine._sessions
        assert set(found) == {one.id for one in self.sessions}
        assert set(self.service._sessions) == {one.id for one in self.sessions if not one.lost}
        assert set(self.service._lost._lost) == {one.id for one in self.lost}
        places = self.admission._places
        assert sorted(place.session.id for place in places if place.session) == sorted(found)
        assert len(places) == len(found)
        assert {place.session.id for place in places if place.session and place.lost} == {
            one.id for one in self.lost
        }
        for one in self.sessions:
            assert (found[one.id].lost is not None) == one.lost
            if not one.unsure:
                assert found[one.id].committed == len(one.rows)
        owned = sum(len(found[one.id].sequence.pages) for one in self.lost)
        assert owned <= LOST_PAGES
        # One writer: whoever may write is the stream that was opened last.
        writers = [stream for _, stream in self.service._sessions.values()]
        assert not any(stream.fenced for stream in writers)
        assert len({id(stream) for stream in writers}) == len(writers)


def test_sessions_keep_their_promises_in_any_order(tiny_llama: Path) -> None:
    Sessions.local = LocalSplit(tiny_llama)
    _run(25)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_session_model_for_long(tiny_llama: Path) -> None:
    Sessions.local = LocalSplit(tiny_llama)
    _run(1000)


def _run(examples: int) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Sessions,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            derandomize=examples < 100,
            suppress_health_check=list(HealthCheck),
        ),
    )
