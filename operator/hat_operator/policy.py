"""Which chunk size each device is proposed: the slow loop's decision. Pure.

The device decides for each prompt, with what it knows of its own link; here all devices and the cloud's load are
seen, a little later. So the device leads: its size is confirmed unless another one is predicted to be clearly faster.
What nobody has measured lately stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median_low

from hat_operator.tuning import Chunking
from hat_runtime.control.chunk_policy import (
    BALANCE,
    DEAD_BAND,
    PASS_TOKENS,
    Bounds,
    Conditions,
    balance,
    predicted_ttft,
)
from hat_runtime.control.pass_cost import PassCost
from hat_runtime.control.published import Proposal, PublishedPolicy

PROMPTS = (256, 1024)
"""Tokens of the prompts that a size should suit."""
AT_ONCE = 1.2
"""A size that takes so many times the best one's time is left at once; else the other must be better twice in a row."""
DEFAULT_BAND = 1.25
"""The size for devices that nobody knows follows the others when it is so many times smaller or larger."""
LARGE = 1.4
"""A size that is so many times another one differs much from it."""
MAX_DEVICES = 2048
"""Devices in a policy; those that have been quiet longest make room."""


@dataclass(frozen=True)
class DeviceSeen:
    """What a device reported, in bytes, seconds and tokens; 0: not measured."""

    uplink_bytes_per_s: float = 0.0
    rtt_s: float = 0.0
    shallow_s_per_token: float = 0.0
    row_bytes: float = 0.0
    """Of a prompt's row on the wire."""
    chunk_tokens: int = 0
    """Its own choice."""


@dataclass(frozen=True)
class CloudTuning:
    """What a replica of the cloud says of itself."""

    cost: PassCost | None = None
    """None: not known yet."""
    wait_s: float = 0.0
    """From a Step's arrival to its pass."""
    company: float = 0.0
    """Rows of others in a pass."""
    prompt_rows: int = PASS_TOKENS
    """Most rows of a prompt in one pass."""


@dataclass(frozen=True)
class Choice:
    """What a device is proposed, and what led to it."""

    chunk: int
    uplink_bytes_per_s: float = 0.0
    """0: not known to this process."""
    company: float = 0.0
    rival: int = 0
    """A size that was better at the last look, but not by enough; 0: none."""


@dataclass(frozen=True)
class Policy:
    """Choices by the device's name, those that were looked at longest ago first."""

    choices: Mapping[str, Choice] = field(default_factory=dict)
    default: int = 0
    """For devices without a choice; 0: none."""

    def published(self, version: int, rule: Chunking) -> PublishedPolicy:
        """As the cloud gets it."""

        def proposal(chunk: int) -> Proposal:
            return Proposal(chunk, rule.least, rule.most)

        return PublishedPolicy(
            version,
            {name: proposal(choice.chunk) for name, choice in self.choices.items()},
            proposal(self.default) if self.default else None,
        )


def restored(published: PublishedPolicy) -> Policy:
    """The policy behind what was published, as far as that tells."""
    choices = {name: Choice(one.chunk_tokens) for name, one in published.devices.items()}
    return Policy(choices, published.default.chunk_tokens if published.default else 0)


def adaptive(mode: str, rule: Chunking) -> bool:
    """Whether chunk sizes are anybody's choice in this mode and with this spec.chunking."""
    return mode == "hat" and rule.mode != "fixed"


def common(replicas: list[CloudTuning]) -> CloudTuning:
    """What a device may expect of any of the replicas: the mean of those that know what a pass costs."""
    known = [one for one in replicas if one.cost is not None]
    if not known:
        return CloudTuning()

    def mean(of: Callable[[CloudTuning], float]) -> float:
        return sum(map(of, known)) / len(known)

    def mean_cost(of: Callable[[PassCost], float]) -> float:
        return sum(of(one.cost) for one in known if one.cost is not None) / len(known)

    cost = PassCost(
        mean_cost(lambda one: one.fixed_s),
        mean_cost(lambda one: one.per_token_s),
        mean_cost(lambda one: one.per_pair_s),
        mean_cost(lambda one: one.per_cached_s),
    )
    rows = min(one.prompt_rows for one in known)
    return CloudTuning(cost, mean(lambda one: one.wait_s), mean(lambda one: one.company), rows)


def next_policy(
    before: Policy, rule: Chunking, cloud: CloudTuning, devices: Mapping[str, DeviceSeen]
) -> Policy:
    """The policy after a look at the figures.

    Args:
        before: the one so far.
        rule: mode and bounds of spec.chunking; what is outside is moved inside, whatever the figures.
        cloud: load and cost; without the cost nothing else changes.
        devices: fresh figures only; devices that are not among them keep what they have.
    """
    bounds = Bounds(rule.least, rule.most)
    choices = {
        name: replace(choice, chunk=bounds.clamp(choice.chunk)) for name, choice in before.choices.items()
    }
    for name, seen in devices.items():
        old = choices.pop(name, None)
        new = _choose(old, rule, bounds, cloud, seen)
        if new is not None:
            choices[name] = new
    for name in list(choices)[: max(0, len(choices) - MAX_DEVICES)]:
        del choices[name]
    default = bounds.clamp(before.default) if before.default else 0
    if choices:
        usual = median_low(choice.chunk for choice in choices.values())
        if not default or differs(default, usual, DEFAULT_BAND):
            default = usual
    return Policy(choices, default)


def differs(one: int, other: int, factor: float = LARGE) -> bool:
    """Whether one of two sizes is at least `factor` times the other."""
    return max(one, other) >= factor * min(one, other)


def _choose(
    old: Choice | None, rule: Chunking, bounds: Bounds, cloud: CloudTuning, seen: DeviceSeen
) -> Choice | None:
    now = Conditions(
        row_bytes=seen.row_bytes,
        uplink_bytes_per_s=seen.uplink_bytes_per_s,
        rtt_s=seen.rtt_s,
        shallow=PassCost(0.0, seen.shallow_s_per_token) if seen.shallow_s_per_token > 0 else None,
        cost=cloud.cost,
        wait_s=cloud.wait_s,
        company=round(cloud.company),
        pass_tokens=max(1, cloud.prompt_rows),
    )
    if not now.known or now.row_bytes <= 0:
        return old
    own = bounds.clamp(seen.chunk_tokens) if seen.chunk_tokens else 0
    kept = old.chunk if old is not None else 0
    best, excess = _best_balance(now, bounds) if rule.mode == BALANCE else _best_predicted(now, bounds)
    target = next((size for size in (own, kept) if size and excess(size) <= 1 / (1 - DEAD_BAND)), best)
    chosen = Choice(target, seen.uplink_bytes_per_s, cloud.company)
    if old is None or target == own or excess(old.chunk) >= AT_ONCE:
        return old if old is not None and old.chunk == target and not old.rival else chosen
    if target == old.chunk:
        return replace(old, rival=0)
    return chosen if old.rival == target else replace(old, rival=target)


def _best_predicted(now: Conditions, bounds: Bounds) -> tuple[int, Callable[[int], float]]:
    """The size that suits all PROMPTS best, and how many times the best one's time a size takes."""
    sizes = bounds.candidates()
    times = {size: [predicted_ttft(now, 0, total, size) for total in PROMPTS] for size in sizes}
    least: list[float] = [min(column) for column in zip(*times.values(), strict=True)]

    def slowness(size: int) -> float:
        if size not in times:
            times[size] = [predicted_ttft(now, 0, total, size) for total in PROMPTS]
        ratios = [took / shortest for took, shortest in zip(times[size], least, strict=True)]
        return sum(ratios) / len(PROMPTS)

    best = min(sizes, key=lambda size: (slowness(size), size))
    lowest = slowness(best)
    return best, lambda size: slowness(size) / lowest


def _best_balance(now: Conditions, bounds: Bounds) -> tuple[int, Callable[[int], float]]:
    """HAT's own size, and how many times larger or smaller than it another one is."""
    best = balance(now, PROMPTS[-1], bounds)
    return best, lambda size: max(size, best) / min(size, best)
