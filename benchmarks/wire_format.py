"""Why the wire looks as it does: one raw bytes field in frames of at most 512 KiB (docs/decisions/0002).

Measures on loopback, in this process pair, with grpc.aio and one bidirectional stream that echoes:
  1. round trip of n hidden states as hat.v1 Step (protobuf, one bytes field), as bare bytes (no protobuf) and as a
     packed `repeated float`;
  2. how long an 8 KiB message of one stream waits behind another stream's bulk, sent as one message or as frames;
  3. encoding and decoding a chunk: raw copy, safetensors, pickle.

Usage: benchmarks/wire_format.py [--repeats N] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import pickle
import platform
import statistics
import time
from collections.abc import AsyncIterator, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import safetensors.torch
import torch

from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.wire import codec, frames

KIB = 1024
SIZES = (8 * KIB, 64 * KIB, 512 * KIB, 2048 * KIB, 8192 * KIB)
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
METHOD = "/hat.bench.Echo/{}"


def _float_message() -> type[Any]:
    """A message with one field, `repeated float values = 1` (packed, as proto3 does)."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="hat_bench.proto", package="hat.bench", syntax="proto3")
    field = file.message_type.add(name="Floats").field.add(name="values", number=1)
    field.type = descriptor_pb2.FieldDescriptorProto.TYPE_FLOAT
    field.label = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("hat.bench.Floats"))


class _Echo(grpc.GenericRpcHandler):
    """Echoes every message of a stream; /Bytes without protobuf, /Step and /Floats parsed and serialised anew."""

    def __init__(self) -> None:
        floats = _float_message()
        self.kinds: dict[str, tuple[Any, Any]] = {
            METHOD.format("Bytes"): (None, None),
            METHOD.format("Step"): (pb.Step.FromString, pb.Step.SerializeToString),
            METHOD.format("Floats"): (floats.FromString, floats.SerializeToString),
            METHOD.format("Sink"): (pb.Step.FromString, pb.Step.SerializeToString),
        }

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        name = handler_call_details.method
        if name not in self.kinds:
            return None
        decode, encode = self.kinds[name]
        sink = name.endswith("Sink")

        async def echo(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            async for request in requests:
                if not sink:
                    yield request

        return grpc.stream_stream_rpc_method_handler(echo, decode, encode)


def _serve(pipe: Connection) -> None:
    async def main() -> None:
        server = grpc.aio.server(options=UNLIMITED)
        server.add_generic_rpc_handlers((_Echo(),))
        pipe.send(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await server.wait_for_termination()

    asyncio.run(main())


async def round_trips(channel: grpc.aio.Channel, size: int, repeats: int) -> dict[str, float]:
    """Median round trip in ms of `size` bytes (float32 values) in each of three forms; encode and decode included."""
    floats = _float_message()
    tensor = torch.randn(size // 4)
    raw = codec.encode(tensor.view(1, -1))

    def step() -> pb.Step:
        return pb.Step(n=1, want=pb.WANT_ALL, payload=codec.encode(tensor.view(1, -1)))

    forms: dict[str, tuple[Any, Any, Callable[[], Any], Callable[[Any], Any]]] = {
        "Step": (
            pb.Step.SerializeToString,
            pb.Step.FromString,
            step,
            lambda reply: codec.decode(reply.payload, 1, size // 4, torch.float32),
        ),
        "Bytes": (None, None, lambda: codec.encode(tensor.view(1, -1)), lambda reply: len(reply) == len(raw)),
        "Floats": (
            floats.SerializeToString,
            floats.FromString,
            lambda: floats(values=tensor.tolist()),
            lambda reply: torch.tensor(reply.values),
        ),
    }
    result = {}
    for name, (encode, decode, make, read) in forms.items():
        call = channel.stream_stream(METHOD.format(name), encode, decode)()
        times = []
        for _ in range(repeats + 2):
            started = time.perf_counter()
            await call.write(make())
            read(await call.read())
            times.append(time.perf_counter() - started)
        await call.done_writing()
        result[name] = statistics.median(times[2:]) * 1e3
    return result


async def behind_bulk(channel: grpc.aio.Channel, bulk: int, frame: int, repeats: int) -> tuple[float, float]:
    """Median and 95th percentile in ms of an 8 KiB echo while another stream sends `bulk` bytes again and again."""
    payload = bytes(bulk)
    sink = channel.stream_stream(METHOD.format("Sink"), pb.Step.SerializeToString, pb.Step.FromString)()

    async def send_bulk() -> None:
        while True:
            for part, more in frames.split(payload, frame):
                await sink.write(pb.Step(payload=part, more=more))

    busy = asyncio.create_task(send_bulk())
    echo = channel.stream_stream(METHOD.format("Step"), pb.Step.SerializeToString, pb.Step.FromString)()
    small = pb.Step(n=1, payload=bytes(8 * KIB))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        await echo.write(small)
        await echo.read()
        times.append((time.perf_counter() - started) * 1e3)
        await asyncio.sleep(0.01)
    busy.cancel()
    sink.cancel()
    await echo.done_writing()
    return statistics.median(times), statistics.quantiles(times, n=20)[-1]


def encodings(repeats: int) -> dict[str, tuple[float, float, int]]:
    """(encode ms, decode ms, bytes) of 512 hidden states of width 4,096 in bfloat16 (4 MiB)."""
    hidden = torch.randn(512, 4096).to(torch.bfloat16)
    forms: dict[str, tuple[Callable[[], bytes], Callable[[bytes], Any]]] = {
        "raw": (lambda: codec.encode(hidden), lambda data: codec.decode(data, 512, 4096, torch.bfloat16)),
        "safetensors": (lambda: safetensors.torch.save({"h": hidden}), safetensors.torch.load),
        "pickle": (lambda: pickle.dumps(hidden), pickle.loads),
    }
    result = {}
    for name, (encode, decode) in forms.items():
        data = encode()
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            started = time.perf_counter()
            encode()
            middle = time.perf_counter()
            decode(data)
            times[0].append(middle - started)
            times[1].append(time.perf_counter() - middle)
        result[name] = (statistics.median(times[0]) * 1e3, statistics.median(times[1]) * 1e3, len(data))
    return result


async def measure(port: int, repeats: int) -> dict[str, Any]:
    """All figures, as printed and as in the JSON file."""
    report: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "grpcio": grpc.__version__,
    }
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=UNLIMITED) as channel:
        print(f"{'payload':>10}  {'Step':>8}  {'bytes':>8}  {'floats':>8}   median round trip, ms")
        report["round_trip_ms"] = {}
        for size in SIZES:
            row = await round_trips(channel, size, repeats if size <= 512 * KIB else max(5, repeats // 10))
            report["round_trip_ms"][size] = row
            print(f"{size // KIB:>6} KiB  {row['Step']:8.2f}  {row['Bytes']:8.2f}  {row['Floats']:8.2f}")
        print(
            "\n8 KiB echo while another stream of the same connection sends 16 MiB tensors: median, p95 in ms"
        )
        report["behind_bulk_ms"] = {}
        for frame in (64 * KIB, frames.MAX_FRAME_BYTES, 2048 * KIB, 16384 * KIB):
            median, p95 = await behind_bulk(channel, 16384 * KIB, frame, repeats)
            report["behind_bulk_ms"][frame] = {"median": median, "p95": p95}
            print(f"{frame // KIB:>6} KiB frames  {median:8.2f}  {p95:8.2f}")
    print("\n4 MiB of bfloat16 hidden states: encode ms, decode ms, bytes")
    report["encodings"] = encodings(repeats)
    for name, (encode_ms, decode_ms, size) in report["encodings"].items():
        print(f"{name:>12}  {encode_ms:8.2f}  {decode_ms:8.2f}  {size:>10}")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=200, help="messages per figure (default %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    try:
        report = asyncio.run(measure(ours.recv(), args.repeats))
    finally:
        server.terminate()
        server.join(5)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
