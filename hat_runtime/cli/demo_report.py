"""The demo's closing table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from hat_runtime.cli.split_pair import Asked
from hat_runtime.control import limits
from hat_runtime.control.limits import LimitParts
from hat_runtime.emulation.spec import LinkSpec


@dataclass(frozen=True)
class Figures:
    """What one answer took, in seconds and bytes."""

    prompt_tokens: int
    completion_tokens: int
    chunk_tokens: int
    ttft_s: float
    tbt_s: float | None
    """None for an answer of one token."""
    up_bytes_per_token: float
    """TCP payload on the link for each token that went up: the prompt's and all but the last of the answer's."""
    down_bytes_per_token: float
    """For each token of the answer: only they need a deep state."""


@dataclass(frozen=True)
class Report:
    """The figures of both answers, and what nobody can beat on this link with these layers."""

    link: LinkSpec
    parts: LimitParts
    hat: Figures
    u_shape: Figures

    @property
    def ttft_limit(self) -> float:
        """With chunks of any size."""
        return limits.ttft_chunked_limit(self.parts, self.hat.prompt_tokens)

    @property
    def ttft_unchunked_limit(self) -> float:
        """Without chunks."""
        return limits.ttft_unchunked(self.parts, self.hat.prompt_tokens)

    @property
    def tbt_limit(self) -> float:
        """One token a round trip."""
        return limits.tbt_u_shape(self.parts)


def figures(asked: Asked) -> Figures:
    """From the device's own measurements and the link's byte counters."""
    usage = asked.answer.usage
    hat = asked.answer.figures
    prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
    return Figures(
        prompt_tokens=prompt,
        completion_tokens=completion,
        chunk_tokens=hat["chunk_tokens"],
        ttft_s=hat["ttft_s"],
        tbt_s=hat["tbt_s"],
        up_bytes_per_token=asked.up_bytes / (prompt + completion - 1),
        down_bytes_per_token=asked.down_bytes / completion,
    )


def as_json(report: Report) -> dict[str, Any]:
    """All figures, in seconds and bytes."""
    return {
        "link": str(report.link),
        "hat": asdict(report.hat),
        "u_shape": asdict(report.u_shape),
        "limit": {
            "ttft_s": report.ttft_limit,
            "ttft_unchunked_s": report.ttft_unchunked_limit,
            "tbt_s": report.tbt_limit,
            "bytes_per_token": report.parts.hidden_bytes,
        },
        "parts": asdict(report.parts),
    }


def as_text(report: Report) -> str:
    """A table for a terminal of 80 columns."""
    hat, u_shape, h = report.hat, report.u_shape, report.parts.hidden_bytes
    rows = [
        (
            "time to first token",
            hat.ttft_s,
            report.ttft_limit,
            u_shape.ttft_s,
            report.ttft_unchunked_limit,
            _ms,
        ),
        ("time between tokens", hat.tbt_s, report.tbt_limit, u_shape.tbt_s, report.tbt_limit, _ms),
        ("bytes up a token", hat.up_bytes_per_token, h, u_shape.up_bytes_per_token, h, _bytes),
        ("bytes down a token", hat.down_bytes_per_token, h, u_shape.down_bytes_per_token, h, _bytes),
    ]
    lines = [
        f"{hat.prompt_tokens} tokens asked, {hat.completion_tokens} answered, over {report.link.describe()}",
        "",
        f"{'':22}{'HAT':>10}{'limit':>11}{'U-shape':>13}{'limit':>11}",
        f"{'':22}{f'chunks: {hat.chunk_tokens}':>10}{'':11}{'no chunks':>13}",
    ]
    lines += [
        f"{name:22}{show(ours):>10}{show(limit):>11}{show(plain):>13}{show(plain_limit):>11}"
        for name, ours, limit, plain, plain_limit, show in rows
    ]
    lines += [
        "",
        "limit: what this link and bare transformers layers on this machine allow, measured just now.",
        f"Hidden states crossed the link, {h:.0f} bytes each; text and token ids were not transmitted.",
    ]
    return "\n".join(lines)


Show = Callable[[float | None], str]


def _ms(seconds: float | None) -> str:
    return (
        "-" if seconds is None else f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"
    )


def _bytes(count: float | None) -> str:
    return "-" if count is None else f"{count:,.0f}"
