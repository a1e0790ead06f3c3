"""Token mode: runtime.proto's TokenStep -> one StepWork, and verdicts back, with every check that needs no engine."""

from __future__ import annotations

import math
import time

from hat_runtime.cloud.assembly import ProtocolError, check_step
from hat_runtime.cloud.session import StepWork, Want
from hat_runtime.cloud.tokens import Choosing, Decoded, Tokens, Verdict
from hat_runtime.errors import UsageError
from hat_runtime.model.sampling import SamplingParams
from hat_runtime.model.speculation import SAMPLERS, THINNING
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb

_WANTS = {pb.WANT_NONE: Want.NONE, pb.WANT_LAST: Want.LAST}


class TokenAssembler:
    """Checks Steps of token ids. A Step is one frame."""

    def __init__(self, vocab_size: int, limits: pb.Limits) -> None:
        self._vocab_size = vocab_size
        self._limits = limits
        self._choosing: Choosing | None = None  # as of the last Step that said

    def feed(self, step: pb.Step) -> StepWork:
        """The Step.

        Raises:
            ProtocolError: names the field that is wrong, and its value.
        """
        tokens = step.tokens
        if not step.HasField("tokens") or step.payload or step.more:
            raise ProtocolError(
                "this cloud runs in mode picospec: a Step needs Step.tokens, in one frame without Step.payload"
            )
        self._check_counts(step, tokens)
        ids = list(tokens.ids)
        if max(ids) >= self._vocab_size:
            text = f"Step.tokens.ids holds {max(ids)}, which is outside the vocabulary of {self._vocab_size}"
            raise ProtocolError(text)
        if tokens.HasField("sampling"):
            if tokens.drafts == len(ids):
                raise ProtocolError("Step.tokens.sampling comes with a Step whose first token is given")
            self._choosing = self._sampling(tokens.sampling)
        choosing = self._choosing
        if choosing is None:
            raise ProtocolError("Step.tokens.sampling is missing on the first Step")
        work = Tokens(ids, tokens.drafts, self._q(tokens, choosing), choosing, tokens.redraw)
        if work.redraw and (choosing.sampler != THINNING or choosing.in_cloud or work.drafts):
            raise ProtocolError(
                f"Step.tokens.redraw={work.redraw} goes with sampler thinning, temperature > 0 and no drafts"
            )
        return StepWork(step.epoch, step.start_pos, _WANTS[step.want], None, time.monotonic(), tokens=work)

    def _check_counts(self, step: pb.Step, tokens: pb.TokenStep) -> None:
        check_step(step, _WANTS, self._limits)
        if len(tokens.ids) != step.n:
            raise ProtocolError(f"Step.tokens.ids holds {len(tokens.ids)} ids, but Step.n={step.n}")
        if tokens.drafts > step.n:
            raise ProtocolError(f"Step.tokens.drafts={tokens.drafts} is more than Step.n={step.n}")
        if (tokens.drafts or tokens.redraw) and step.want != pb.WANT_LAST:
            raise ProtocolError("Step.want must be LAST where Step.tokens has drafts or redraw")

    @staticmethod
    def _sampling(sampling: pb.Sampling) -> Choosing:
        if sampling.sampler not in SAMPLERS:
            raise ProtocolError(f"Sampling.sampler={sampling.sampler!r} is none of {', '.join(SAMPLERS)}")
        try:
            params = SamplingParams(sampling.temperature, sampling.top_p, sampling.seed)
        except UsageError as error:
            raise ProtocolError(f"Step.tokens.sampling: {error}") from error
        return Choosing(params, sampling.sampler, sampling.ahead, sampling.end, frozenset(sampling.stop_ids))

    @staticmethod
    def _q(tokens: pb.TokenStep, choosing: Choosing) -> list[float]:
        wanted = 0 if choosing.in_cloud else tokens.drafts
        if len(tokens.q) != wanted:
            raise ProtocolError(f"Step.tokens.q holds {len(tokens.q)} numbers, but {wanted} are needed")
        q = list(tokens.q)
        wrong = next((value for value in q if math.isnan(value) or not 0.0 < value <= 1.0), None)
        if wrong is not None:
            raise ProtocolError(f"Step.tokens.q holds {wrong}, which is not above 0 and at most 1")
        return q


def verdict_message(verdict: Verdict) -> pb.Verdict:
    """For Result.verdict."""
    offered = verdict.offered
    return pb.Verdict(
        accepted=verdict.accepted,
        refused=verdict.refused,
        next=verdict.next,
        ids=offered.ids if offered else (),
        probabilities=offered.probabilities if offered else (),
    )


def decoded_message(decoded: Decoded) -> pb.CloudMessage:
    """A Notice."""
    notice = pb.Decoded(epoch=decoded.epoch, start_pos=decoded.start_pos, ids=decoded.ids)
    return pb.CloudMessage(notice=pb.Notice(decoded=notice))
