"""The picospec suite: token mode over slow links, without drafts, with synchronous speculation, and as PicoSpec.

Device and cloud have a core each, the emulated link is between them. "Cloud alone" is the same server without drafts:
it decodes by itself and streams what it finds, so that a link costs it no round trip a token. The bound of a round is
max(T_draft, T_RTT + T_verify) (arXiv 2603.19133); its parts are bare passes of both models on the same cores, and a raw
socket through the link.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hat_runtime.cli.completions import whole_completion
from hat_runtime.cli.limit_parts import bare_passes
from hat_runtime.cli.processes import Children
from hat_runtime.cli.split_pair import Pair, PairConfig, running_pair
from hat_runtime.control.limits import round_bound
from hat_runtime.emulation.measure import measure_link
from hat_runtime.emulation.spec import LinkSpec

ALONE, SYNCHRONOUS = "cloud alone", "synchronous"


@dataclass(frozen=True)
class PicospecConfig:
    """What is measured."""

    model: Path
    draft_model: Path
    device_cores: frozenset[int]
    cloud_cores: frozenset[int]
    max_draft: int = 4
    """gamma"""
    dtype: str = "bfloat16"
    max_tokens: int = 96


@dataclass(frozen=True)
class Way:
    """One way to answer."""

    name: str
    max_draft: int
    window: int


@dataclass(frozen=True)
class Row:
    """One way, set of prompts and link."""

    prompts: str
    link: str
    way: str
    tokens_per_s: float
    accepted: float
    """Share of all drafts; those behind a refused one count as not accepted."""
    tokens_a_round: float
    """Of a round trip with drafts; 0 where the cloud decodes by itself meanwhile, and answers are no rounds."""
    bound_s: float
    """Of a round."""


@dataclass(frozen=True)
class Parts:
    """What the bounds are made of, in seconds."""

    draft_s: float
    """A bare pass of the draft model."""
    one_s: float
    """A bare pass of the large model over one token."""
    verify_s: float
    """The same over a round's drafts."""
    rtt_s: Mapping[str, float]
    """By link, as a raw socket sees it."""


def measure(
    config: PicospecConfig,
    links: Mapping[str, LinkSpec],
    prompts: Mapping[str, Sequence[Sequence[int]]],
    say: Callable[[str], None],
) -> tuple[Parts, list[Row]]:
    """All ways over all links for all sets of prompts (token ids), one answer at a time.

    Raises:
        HatError: a process ended or refused.
    """
    # The emulated link runs beside us: it must not compute on the cloud's core.
    os.sched_setaffinity(0, config.device_cores)
    say("measuring bare models on one core each")
    gamma = config.max_draft
    draft_s = bare_passes(config.draft_model, [1], config.dtype, config.device_cores)[1]
    target = bare_passes(config.model, sorted({1, gamma}), config.dtype, config.cloud_cores)
    rtt_s = {name: measure_link(link).rtt_s for name, link in links.items()}
    parts = Parts(draft_s, target[1], target[gamma], rtt_s)
    rows: list[Row] = []
    for way in (Way(ALONE, 0, 1), Way(SYNCHRONOUS, gamma, 1), Way("PicoSpec", gamma, 2)):
        pair_config = PairConfig(
            config.model,
            next(iter(links.values())),
            dtype=config.dtype,
            device_cores=config.device_cores,
            cloud_cores=config.cloud_cores,
            draft_model=config.draft_model,
            speculation=("--max-draft", str(way.max_draft), "--window", str(way.window)),
        )
        with Children() as children, running_pair(pair_config, children, say) as pair:
            for name, link in links.items():
                assert pair.link is not None
                pair.link.set_link(link)
                bound_s = round_bound(draft_s, gamma, rtt_s[name], target[gamma])
                for chosen, encoded in prompts.items():
                    row = _row(pair, way, chosen, name, encoded, config.max_tokens, bound_s)
                    say(f"  {way.name}, {chosen}, {name}: {row.tokens_per_s:.1f} tokens/s")
                    rows.append(row)
    return parts, rows


def _row(
    pair: Pair,
    way: Way,
    prompts: str,
    link: str,
    encoded: Sequence[Sequence[int]],
    max_tokens: int,
    bound_s: float,
) -> Row:
    """All prompts one after the other, after one that is not counted."""
    whole_completion(pair.url, list(encoded[0]), max_tokens=max_tokens)
    tokens = rounds = drafted = accepted = 0
    seconds = 0.0
    for ids in encoded:
        answer = whole_completion(pair.url, list(ids), max_tokens=max_tokens)
        figures, count = answer.figures, answer.usage["completion_tokens"]
        if count < 2:
            continue
        tokens += count - 1  # the first one is the prompt's
        seconds += figures["tbt_s"] * (count - 1)
        rounds += figures["rounds"] - 1
        drafted += figures["draft_tokens"]
        accepted += figures["accepted_tokens"]
    in_rounds = way.window == 1 and way.max_draft > 0
    return Row(
        prompts,
        link,
        way.name,
        tokens / seconds if seconds else 0.0,
        accepted / drafted if drafted else 0.0,
        tokens / rounds if in_rounds and rounds else 0.0,
        bound_s,
    )
