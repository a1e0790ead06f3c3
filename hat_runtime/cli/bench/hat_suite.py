"""The hat suite: every row of the ablation over several links, beside the limit that its features allow.

One cloud (and one that cuts prompts itself), and one device process a row, all of them up at once: rows take turns at
each prompt, so that a change of the machine's speed hits all alike. Processes that are not asked do nothing.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hat_runtime.cli.bench.hat_rows import SERVER_CHUNK, Row
from hat_runtime.cli.completions import Answer, stream_completion
from hat_runtime.cli.processes import Child, Children, free_address, hat_command
from hat_runtime.cli.split_pair import INPUT_LAYERS, READY_S
from hat_runtime.control import limits
from hat_runtime.control.limits import LimitParts
from hat_runtime.emulation.link import EmulatedLink
from hat_runtime.emulation.spec import LinkSpec
from hat_runtime.errors import HatError


@dataclass(frozen=True)
class SuiteConfig:
    """What is measured."""

    model: Path
    rows: Sequence[Row]
    device_cores: frozenset[int]
    cloud_cores: frozenset[int]
    input_layers: int = INPUT_LAYERS
    dtype: str = "bfloat16"
    max_tokens: int = 48
    sessions: Sequence[int] = (1, 4)


@dataclass(frozen=True)
class Prompt:
    """What is asked."""

    ids: list[int]
    source: str = ""
    """Name of the file that it comes from: times to the first token are told apart by it."""


@dataclass(frozen=True)
class Sample:
    """One answer."""

    source: str
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    tbt_s: float
    rounds: int
    drafted: int
    accepted: int
    """Alternatives included."""
    positions: int
    """Where a draft was judged whose predecessors were right."""
    bytes: int


@dataclass(frozen=True)
class Device:
    """A running row."""

    row: Row
    url: str
    child: Child


@dataclass(frozen=True)
class Stand:
    """Everything that runs."""

    link: EmulatedLink
    server_link: EmulatedLink
    devices: list[Device]

    def set_link(self, link: LinkSpec) -> None:
        """Change the link under way."""
        self.link.set_link(link)
        self.server_link.set_link(link)


@contextlib.contextmanager
def running_stand(
    config: SuiteConfig, link: LinkSpec, children: Children, say: Callable[[str], None]
) -> Iterator[Stand]:
    """Start clouds, link and devices.

    Raises:
        HatError: one of them ends or takes too long.
    """
    common = ["--model", str(config.model), "--dtype", config.dtype]

    def cloud(name: str, *options: str) -> tuple[str, str, Child]:
        address, http = free_address(), free_address()
        command = hat_command("cloud", "serve", *common, "--input-layers", str(config.input_layers))
        command += ["--listen", address, "--http-listen", http, "--kv-memory", "0.5", *options]
        return address, http, children.start(name, command, cores=config.cloud_cores)

    say(f"starting 2 clouds and {len(config.rows)} devices")
    clouds = [cloud("cloud"), cloud("cloud-chunks", "--max-batch-tokens", str(SERVER_CHUNK))]
    for _, http, child in clouds:
        child.wait_ready(f"http://{http}/readyz", READY_S)
    with EmulatedLink(clouds[0][0], link) as plain, EmulatedLink(clouds[1][0], link) as chunked:
        devices = []
        for number, row in enumerate(config.rows):
            api = free_address()
            through = chunked if row.server_chunks else plain
            command = hat_command("device", "serve", *common, "--listen", api, "--cloud", through.address)
            command += ["--keep-sessions", "0", "--grace", "1", "--kv-tokens", "8192", *row.options]
            child = children.start(f"device-{number}", command, cores=config.device_cores)
            child.wait_ready(f"http://{api}/readyz", READY_S)
            devices.append(Device(row, f"http://{api}", child))
        yield Stand(plain, chunked, devices)


def warm_up(stand: Stand, prompt: Prompt, max_tokens: int) -> None:
    """What is done for the first time is slow everywhere; and drafting learns what it costs on this link."""
    for device in stand.devices:
        for _ in range(2):
            _ask(device, prompt, max_tokens)


def measure(
    stand: Stand, prompts: Sequence[Prompt], sessions: int, max_tokens: int, say: Callable[[str], None]
) -> dict[str, list[Sample]]:
    """Every row answers every prompt, `sessions` at a time; by the row's name.

    Raises:
        HatError: a device refused or went away.
    """
    found: dict[str, list[Sample]] = {device.row.name: [] for device in stand.devices}
    for first in range(0, len(prompts), sessions):
        group = prompts[first : first + sessions]
        if len(group) < sessions:
            break
        for device in stand.devices:
            found[device.row.name] += _together(device, group, max_tokens)
        say(f"  {first + len(group)} of {len(prompts)} prompts, {sessions} at a time")
    return found


def _together(device: Device, prompts: Sequence[Prompt], max_tokens: int) -> list[Sample]:
    samples: list[Sample | None] = [None] * len(prompts)
    errors: list[HatError] = []

    def ask(index: int) -> None:
        try:
            samples[index] = _ask(device, prompts[index], max_tokens)
        except HatError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        device.child.check()
        raise errors[0]
    return [sample for sample in samples if sample is not None]


def _ask(device: Device, prompt: Prompt, max_tokens: int) -> Sample:
    answer = stream_completion(
        device.url, prompt.ids, max_tokens=max_tokens, chunk_tokens=device.row.chunk_tokens
    )
    return _sample(answer, prompt.source)


def _sample(answer: Answer, source: str) -> Sample:
    usage, hat = answer.usage, answer.figures
    return Sample(
        source,
        usage["prompt_tokens"],
        usage["completion_tokens"],
        hat["ttft_s"],
        hat["tbt_s"] or 0.0,
        hat["rounds"],
        hat["draft_tokens"],
        hat["accepted_tokens"] + hat["alternatives_accepted"],
        hat["accepted_tokens"] + hat["refusals"],
        hat["uplink_bytes"] + hat["downlink_bytes"],
    )


@dataclass(frozen=True)
class Ttft:
    """Times to the first token for the prompts of one file, in seconds."""

    median_s: float
    limit_s: float
    """Median of the prompts' limits."""
    over_limit: float
    """Median of time / limit, prompt by prompt."""


@dataclass(frozen=True)
class Summary:
    """A row on one link with a number of sessions."""

    row: str
    features: list[str]
    ttft: dict[str, Ttft]
    """By the prompts' file."""
    ttfts_s: list[float]
    """Prompt by prompt: every row has the same prompts in the same order."""
    tbt_s: float
    """Mean over all tokens."""
    tokens_a_round: float
    """Rounds of decoding; the prompt's is not one."""
    acceptance: float
    """Of a draft whose predecessors were right; a right alternative counts as one."""
    drafts_a_round: float
    """Judged or dropped; without alternatives."""
    bytes_a_token: float
    """Both ways, of prompt and answer."""
    tbt_limit_s: float
    tbt_over_limit: float
    round_over_limit: float
    """A round's time over that of bare layers and link for as many drafts, made before it leaves."""


def summarise(row: Row, samples: Sequence[Sample], parts: LimitParts, t_draft: float) -> Summary:
    """The figures of a row; limits for each prompt's own length, at the row's measured acceptance."""
    accepted = sum(sample.accepted for sample in samples)
    acceptance = accepted / max(1, sum(sample.positions for sample in samples))
    tbt_limit = row.tbt_limit(parts, acceptance, t_draft)
    decoding = [sample for sample in samples if sample.completion_tokens > 1]
    steps = sum(sample.completion_tokens - 1 for sample in decoding)
    decoding_s = sum(sample.tbt_s * (sample.completion_tokens - 1) for sample in decoding)
    rounds = max(1, sum(sample.rounds - 1 for sample in decoding))
    drafts = sum(sample.drafted for sample in decoding) / rounds
    tbt = decoding_s / max(1, steps)
    return Summary(
        row.name,
        sorted(row.features),
        _ttfts(row, samples, parts),
        [sample.ttft_s for sample in samples],
        tbt,
        steps / rounds,
        acceptance,
        drafts,
        sum(sample.bytes for sample in samples)
        / sum(sample.prompt_tokens + sample.completion_tokens for sample in samples),
        tbt_limit,
        tbt / tbt_limit,
        decoding_s / rounds / limits.round_synchronous(parts, drafts, t_draft),
    )


def _ttfts(row: Row, samples: Sequence[Sample], parts: LimitParts) -> dict[str, Ttft]:
    found = {}
    for source in dict.fromkeys(sample.source for sample in samples):
        own = [sample for sample in samples if sample.source == source]
        bounds = [row.ttft_limit(parts, sample.prompt_tokens) for sample in own]
        found[source] = Ttft(
            statistics.median(sample.ttft_s for sample in own),
            statistics.median(bounds),
            statistics.median(sample.ttft_s / limit for sample, limit in zip(own, bounds, strict=True)),
        )
    return found


def as_json(results: Sequence[tuple[str, LinkSpec, int, LimitParts, list[Summary]]]) -> str:
    """All figures."""
    records: list[dict[str, Any]] = [
        {
            "link": name,
            "spec": str(link),
            "sessions": sessions,
            "parts": vars(parts),
            "rows": [asdict(summary) for summary in summaries],
        }
        for name, link, sessions, parts, summaries in results
    ]
    return json.dumps(records, indent=2)
