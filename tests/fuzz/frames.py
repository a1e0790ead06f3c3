"""Messages of the session protocol that are nearly right, and bytes that are nearly messages."""

from __future__ import annotations

import random
from typing import ClassVar

import torch

from hat_runtime.cloud.serve import RunningCloud
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from tests.runtime.raw_client import opening

MOST = 2**32 - 1
NUMBERS = [0.0, -1.0, 1e-310, 0.5, 1e300, float("nan"), float("inf"), float("-inf")]


class Nonsense:
    """Streams for a cloud of mode hat."""

    open_fields: ClassVar[dict[str, str]] = {}

    def __init__(self, seed: int, cloud: RunningCloud) -> None:
        self.rng = random.Random(seed)
        self.cloud = cloud
        self.careful = False
        """Whether this stream's messages are right one by one, and only odd."""
        self.end = 0
        """Where the stream's text probably ends."""

    def stream(self) -> list[bytes]:
        """The messages of one stream; most begin with a correct Open, so that the rest is reached."""
        self.end, self.careful = 0, self.rng.random() < 0.4
        if self.careful:
            steps = [self.right_step() for _ in range(self.rng.randint(2, 12))]
            return [message.SerializeToString() for message in (self.open(), *steps)]
        first = self.open().SerializeToString() if self.rng.random() < 0.8 else self.message()
        return [first, *(self.message() for _ in range(self.rng.randint(1, 6)))]

    def open(self) -> pb.DeviceMessage:
        """A correct Open."""
        codecs = ["raw"] if self.careful else ["raw", "raw", "int8", "int4"]
        codec, decode_codec = self.rng.choice(codecs), self.rng.choice(codecs)
        device = self.rng.choice(["", "a", f"d{self.rng.randrange(5000)}", "../x", "n" * 70_000, "\n\u202e"])
        return opening(self.cloud, codec=codec, decode_codec=decode_codec, device=device)

    def message(self) -> bytes:
        """A message, or bytes."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.1:
            return rng.randbytes(rng.choice([0, 1, 7, 200, 5000]))
        data = (self.step() if kind < 0.8 else self.other()).SerializeToString()
        return mutated(rng, data) if rng.random() < 0.3 else data

    def describe(self) -> bytes:
        """A request for Describe."""
        rng = self.rng
        asked = pb.DescribeRequest(
            padding=rng.randbytes(rng.choice([0, 9, 3000])),
            reply_padding_bytes=rng.choice([0, 1, 1 << 19, MOST]),
        )
        return mutated(rng, asked.SerializeToString()) if rng.random() < 0.5 else asked.SerializeToString()

    def step(self) -> pb.DeviceMessage:
        """A Step whose fields contradict each other more often than not."""
        rng = self.rng
        n = rng.choice([0, 1, 1, 2, 5, 30, 3000, MOST])
        start = rng.choice([0, 0, 0, 1, 5, 400, MOST])
        aside = self.alternatives(start, n) if rng.random() < 0.3 else []
        rows = n + len(aside)
        encoded = rng.randbytes(min(rows, 40) * rng.choice([82, 116]))  # of int4 and of int8
        payload = rng.choice(
            [self.rows(rows), self.rows(rows), encoded, rng.randbytes(rng.randint(0, 600)), b""]
        )
        return pb.DeviceMessage(
            step=pb.Step(
                epoch=rng.choice([0, 0, 1, MOST]),
                start_pos=start,
                n=n,
                want=rng.choice([0, 1, 2, 3, 3, 77]),
                payload=payload,
                more=rng.random() < 0.1,
                request_id=rng.choice(["", "x" * 5000, "\n\u202e"]),
                decode=rng.random() < 0.3,
                alternatives=aside,
                tokens=pb.TokenStep(ids=[1]) if rng.random() < 0.02 else None,
            )
        )

    def right_step(self) -> pb.DeviceMessage:
        """A Step that must be answered: any truncation, any values that are numbers, positions beside it."""
        rng = self.rng
        n = rng.choice([1, 1, 2, 7, 40])
        start = self.end if rng.random() < 0.6 else rng.randint(0, self.end)
        start = start if start + n <= 300 else 0
        want = rng.choice([1, 2, 3, 3])
        count = rng.choice([0, 1, 5]) if want == pb.WANT_ALL else 0
        aside = [rng.randint(start, start + n) for _ in range(count)]
        values = rng.choices([0.5, -3.0, 1e3, 1e-40, -0.0], k=(n + count) * 64)
        payload = torch.tensor(values, dtype=torch.float32).numpy().tobytes()
        self.end = start + n
        return pb.DeviceMessage(
            step=pb.Step(start_pos=start, n=n, want=want, payload=payload, alternatives=aside)
        )

    def alternatives(self, start: int, n: int) -> list[int]:
        """Positions beside the n rows; most of them right."""
        rng = self.rng
        count = rng.choice([1, 2, min(n, 20), 9, 700])
        last = min(start + min(n, 40), MOST)
        wrong = rng.random() < 0.2
        return [rng.randint(0, MOST) if wrong else rng.randint(start, last) for _ in range(count)]

    def rows(self, n: int) -> bytes:
        """At most 40 rows of float32, some of them far out."""
        values = [0.5, -3.0, 1e30, -1e38, 1e-40] + [float("nan"), float("inf")] * (self.rng.random() < 0.2)
        drawn = self.rng.choices(values, k=min(n, 40) * 64)
        return torch.tensor(drawn, dtype=torch.float32).numpy().tobytes()

    def other(self) -> pb.DeviceMessage:
        """An Open in the wrong place or with wrong fields, Telemetry, or nothing."""
        rng = self.rng
        number = lambda: rng.choice(NUMBERS)  # noqa: E731
        wrong = rng.choice(["", "\x00", "x" * 300_000, "hat", "picospec"])
        return rng.choice(
            [
                opening(self.cloud, **{**self.open_fields, "max_tokens": rng.choice([0, 1, MOST])}),
                opening(
                    self.cloud, tenant="t" * rng.choice([0, 70_000]), request_id=rng.choice(["", "\x00"])
                ),
                opening(self.cloud, **{rng.choice(["mode", "dtype", "codec", "model_revision"]): wrong}),
                opening(self.cloud, resume=pb.Resume(session_id=rng.choice(["", "ab", wrong]))),
                pb.DeviceMessage(
                    telemetry=pb.Telemetry(
                        rtt_s=number(),
                        uplink_bytes_per_s=number(),
                        ttft_s=number(),
                        shallow_s_per_token=number(),
                        acceptance=number(),
                        chunk_tokens=rng.choice([0, 64, MOST]),
                    )
                ),
                pb.DeviceMessage(),
            ]
        )


class TokenNonsense(Nonsense):
    """Streams for a cloud of mode picospec."""

    open_fields: ClassVar = {"mode": "picospec", "codec": "tokens"}

    def __init__(self, seed: int, cloud: RunningCloud, vocabulary: int) -> None:
        super().__init__(seed, cloud)
        self.vocabulary = vocabulary
        self.sampled: pb.Sampling | None = None
        """As the stream's Steps said last."""

    def open(self) -> pb.DeviceMessage:
        self.sampled = None
        most = 0 if self.careful else self.rng.choice([0, 0, 3, 200])
        return opening(self.cloud, **self.open_fields, max_tokens=most)

    def right_step(self) -> pb.DeviceMessage:
        """Given tokens and drafts of any kind with extreme ways to choose; a refusal makes those behind it stale."""
        rng = self.rng
        start = 0 if not self.end or rng.random() < 0.3 else self.end
        if not start:
            self.sampled = pb.Sampling(
                sampler=rng.choice(["coupled", "thinning", "topk"]),
                temperature=rng.choice([0.0, 0.7, 1.0, 2.0, 5e-324, 1e-300, 1e-30, 1e-3, 1e30, 1.7e308]),
                top_p=rng.choice([1.0, 0.9, 5e-324, 1e-300, 1e-9]),
                seed=rng.choice([0, 7, 2**64 - 1]),
                ahead=rng.choice([0, 0, 1, 4, MOST]),
                stop_ids=[rng.choice([0, 2, MOST]) for _ in range(rng.choice([0, 1, 300]))],
                end=rng.choice([0, 1, 40, MOST]),
            )
        given = rng.choice([1, 5, 30]) if not start else rng.choice([0, 0, 1])
        drafts = rng.choice([0, 1, 4]) if given else rng.choice([1, 4])
        chosen_here = self.sampled is not None and (
            self.sampled.sampler == "coupled" or self.sampled.temperature == 0
        )
        ids = [rng.randrange(self.vocabulary) for _ in range(given + drafts)]
        q = [] if chosen_here else [rng.choice([1.0, 0.5, 1e-45]) for _ in range(drafts)]
        self.end = start + len(ids)
        tokens = pb.TokenStep(ids=ids, drafts=drafts, q=q, sampling=None if start else self.sampled)
        return pb.DeviceMessage(step=pb.Step(start_pos=start, n=len(ids), want=pb.WANT_LAST, tokens=tokens))

    def step(self) -> pb.DeviceMessage:
        rng = self.rng
        ids = [self.token() for _ in range(rng.choice([0, 1, 1, 4, 9, 60, 600]))]
        drafts = rng.choice([0, 0, 1, len(ids), max(0, len(ids) - 1), 7, MOST])
        said = rng.random()
        tokens = pb.TokenStep(
            ids=ids,
            drafts=drafts,
            q=[self.share() for _ in range(min(drafts, 600) if said < 0.5 else rng.choice([0, 0, 3]))],
            sampling=self.sampling() if not self.end or said < 0.3 else None,
            redraw=rng.choice([0, 0, 0, 0, 1, 2, MOST]),
        )
        start = rng.choice([self.end, self.end, self.end, 0, 1, max(0, self.end - 1), 300, MOST])
        self.end = min(start + len(ids), 400)
        return pb.DeviceMessage(
            step=pb.Step(
                epoch=rng.choice([0, 0, 0, 1, MOST]),
                start_pos=start,
                n=rng.choice([len(ids)] * 6 + [0, MOST]),
                want=rng.choice([1, 2, 2, 2, 3, 0]),
                payload=rng.choice([b""] * 9 + [b"\x00"]),
                more=rng.random() < 0.03,
                decode=rng.random() < 0.1,
                tokens=tokens if rng.random() < 0.97 else None,
                alternatives=[start] if rng.random() < 0.03 else [],
            )
        )

    def token(self) -> int:
        """An id, seldom one that there is not."""
        rng = self.rng
        return rng.randrange(self.vocabulary) if rng.random() < 0.995 else rng.choice([self.vocabulary, MOST])

    def share(self) -> float:
        """A probability, seldom none."""
        rng = self.rng
        return (
            1.0 - rng.random() if rng.random() < 0.98 else rng.choice([0.0, 1e-40, 1.5, float("nan"), -1.0])
        )

    def sampling(self) -> pb.Sampling:
        """How to choose; extreme values of each."""
        rng = self.rng
        return pb.Sampling(
            sampler=rng.choice(["coupled", "coupled", "thinning", "topk", "", "x" * 70_000]),
            temperature=rng.choice([0.0, 0.0, 0.7, 1.0, 2.0, 5e-324, 1e-30, 1e300, -1.0, float("nan")]),
            top_p=rng.choice([1.0, 1.0, 0.9, 1e-300, 0.0, 2.0, float("nan")]),
            seed=rng.choice([0, 7, 2**64 - 1]),
            ahead=rng.choice([0, 0, 1, 4, MOST]),
            stop_ids=[rng.choice([0, 2, MOST]) for _ in range(rng.choice([0, 1, 3000]))],
            end=rng.choice([0, 1, 40, MOST]),
        )


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The same with a few bytes changed, put in or left out."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if changed:
            at = rng.randrange(len(changed))
            changed[at : at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
    return bytes(changed)
