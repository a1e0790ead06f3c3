"""Token mode: Steps that carry token ids in place of hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from hat_runtime.device.steps import Step
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb

MODE = "picospec"
CODEC = "tokens"
NO_ROWS = torch.empty(0, 0)


@dataclass(eq=False)
class TokenStep(Step):
    """A Step of token ids; `hidden` is empty."""

    tokens: pb.TokenStep = field(default_factory=pb.TokenStep)

    @property
    def n(self) -> int:
        """Tokens in the Step."""
        return len(self.tokens.ids)

    @property
    def sent_bytes(self) -> int:
        """A few bytes an id."""
        return self.tokens.ByteSize()

    @property
    def rows_wanted(self) -> int:
        """The Result brings a verdict, no states."""
        return 0

    def messages(self, max_frame_bytes: int) -> Iterator[pb.DeviceMessage]:
        """One frame: 2,048 ids are 6 KiB."""
        yield pb.DeviceMessage(
            step=pb.Step(
                epoch=self.epoch,
                start_pos=self.start,
                n=self.n,
                want=self.want,
                tokens=self.tokens,
                request_id=self.request_id,
            )
        )


def held_after(step: Step, result: pb.Result) -> int:
    """Tokens of what was sent that the cloud holds after it has answered a Step: up to a refusal, else all."""
    if isinstance(step, TokenStep) and result.verdict.refused:
        return step.start + step.n - step.tokens.drafts + result.verdict.accepted
    return step.start + step.n
