"""What the hat suite compares: HAT's ablation (arXiv 2503.18989) and what goes beyond it."""

from __future__ import annotations

from dataclasses import dataclass

from hat_runtime.control import limits
from hat_runtime.control.limits import LimitParts

CHUNK = 128
SERVER_CHUNK = 128


@dataclass(frozen=True)
class Row:
    """One way to serve."""

    name: str
    features: frozenset[str]
    """What is switched on."""
    options: tuple[str, ...]
    """Of `hat device serve`."""

    @property
    def chunk_tokens(self) -> int:
        """Of a prompt; 0: it goes up whole."""
        return CHUNK if "chunks" in self.features else 0

    @property
    def server_chunks(self) -> bool:
        """The cloud cuts prompts, and the device does not."""
        return "server chunks" in self.features

    @property
    def drafts(self) -> bool:
        """Whether the device drafts."""
        return "speculation" in self.features

    def ttft_limit(self, parts: LimitParts, prompt_tokens: int) -> float:
        """What nobody can beat with these features, in seconds (picospec.md 4.4)."""
        if self.chunk_tokens:
            return limits.ttft_chunked_limit(parts, prompt_tokens)
        return limits.ttft_unchunked(parts, prompt_tokens)

    def tbt_limit(self, parts: LimitParts, acceptance: float, t_draft: float) -> float:
        """What nobody can beat with these features at this acceptance, in seconds (picospec.md 4.2)."""
        if not self.drafts:
            return limits.tbt_u_shape(parts)
        if "parallel drafting" in self.features:
            return limits.tbt_pipelined(parts, acceptance, t_draft)
        return min(
            limits.best_synchronous(parts, acceptance, t_draft)[0],
            limits.tbt_u_shape(parts),
        )


def make_rows(drafter: str) -> list[Row]:
    """The rows, each with a superset of the features of some row before it."""
    off = ("--drafter", "none")
    chain = ("--drafter", drafter, "--alternatives", "0")
    waiting = (*chain, "--window", "1", "--branches", "0")
    parallel = (*chain, "--window", "1", "--branches", "3")
    piped = (*chain, "--window", "auto", "--branches", "3")
    tree = ("--drafter", drafter, "--window", "auto", "--branches", "3")
    spec, ahead = {"speculation"}, {"speculation", "parallel drafting"}
    everything = {"chunks", *ahead, "pipelining", "alternatives"}
    return [
        Row("U-shape", frozenset(), off),
        Row("server-only chunking", frozenset({"server chunks"}), off),
        Row("+ chunks", frozenset({"chunks"}), off),
        Row("+ speculation", frozenset(spec), waiting),
        Row("+ both", frozenset({"chunks", *spec}), waiting),
        Row("+ parallel drafting", frozenset({"chunks", *ahead}), parallel),
        Row("+ pipelining", frozenset({"chunks", *ahead, "pipelining"}), piped),
        Row("+ alternatives", frozenset(everything), tree),
        Row("+ int8 uplink", frozenset({*everything, "int8"}), (*tree, "--uplink-codec", "int8")),
    ]
