"""Cloud pods that are killed, deleted, drained and rolled in the middle of 20 answers: a pause, then the same text.

Two replicas on two nodes, three devices, the default model in float32, greedy and seeded (`coupled`) answers in turn.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import tests.benchmark_modules  # noqa: F401 (finds the benchmarks' modules)
from tests.e2e.product import Product
from tests.e2e.replicas import NAME, REPLICAS, Mode, Scene, more_nodes, scene
from tests.e2e.streams import Reply
from tests.e2e.striking import (
    ANSWERS_S,
    Tally,
    delete,
    delete_by_force,
    drain_node,
    kill,
    roll,
    struck,
)
from tests.harness.node import Node

from common import facts, report, table  # isort: skip

pytestmark = [pytest.mark.timeout(1800), pytest.mark.default_model, pytest.mark.long]
MODES: tuple[Mode, ...] = ("hat", "picospec")
LEFT_S = 150.0
"""For what is left over to go: sessions whose device could not say that it wants them no more are kept for 60 s."""
ANSWERS = int(os.environ.get("HAT_FAULT_ANSWERS", "20"))
NEW = 96
LONGEST = NEW + 60
"""Tokens of a prompt and its answer."""
THINGS = (
    *("a lighthouse", "a lost dog", "a night train", "the last whale", "an old violin", "a paper boat"),
    *("two brothers", "a winter garden", "a map without names", "the baker's daughter", "a red balloon"),
    *("a clock that stops", "a desert well", "the first snow", "a borrowed coat", "an empty theatre"),
    *("a bridge", "a talking parrot", "the harbour cat", "a letter that came too late"),
)
BODIES: list[dict[str, Any]] = [
    {
        "model": NAME,
        "messages": [{"role": "user", "content": f"Write a long story about {THINGS[n % len(THINGS)]}."}],
        "max_tokens": NEW,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"temperature": 0} if n % 2 == 0 else {"temperature": 0.8, "seed": n}),
    }
    for n in range(ANSWERS)
]


@dataclass(frozen=True)
class Fault:
    """Something that strikes, and what the contract says of the answers."""

    strike: Callable[[Scene], None]
    again: bool = False
    """It takes longer than an answer: each question is asked again until it is over."""
    allowed: tuple[str, ...] = ()
    """Codes of the errors that an answer may end with instead."""
    resumed: bool = True
    """Answers must be seen to go on elsewhere."""


ROLL_CLOUD = {"cloud": {"template": {"annotations": {"example.com/rolled": "yes"}}}}
ROLL_BOTH = {"runtime": {"version": "0.1.1"}}
FAULTS = {
    "SIGKILL of a replica's container": Fault(kill),
    "pod deleted by force, grace period 0": Fault(delete_by_force),
    "pod deleted": Fault(delete),
    "node drained": Fault(drain_node),
    "rolling upgrade of the cloud": Fault(partial(roll, change=ROLL_CLOUD, sides=("cloud",)), again=True),
    # A device's pod that goes finishes its answers for a minute, then ends them with this error. Requests that it does
    # not accept any more are asked again. The old replicas stay until the last device has left them: none moves.
    "rolling upgrade of cloud and devices": Fault(
        partial(roll, change=ROLL_BOTH, sides=("cloud", "edge")),
        again=True,
        allowed=("interrupted",),
        resumed=False,
    ),
}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "cluster_faults.md"
ABOUT = f"""
{ANSWERS} concurrent answers of up to {NEW} tokens through the devices' OpenAI API, streamed: the default model in
float32, greedy and seeded (`coupled`) in turn, a HatDeployment with two replicas on two nodes and three devices on
nodes of another cluster, all of them real nodes on one machine. When a third of the text is there, something
befalls the replica that has most of the sessions. *exact*: text, number of tokens and reason of the end are those
of the same answer without a fault. *told*: it ended with the error that the contract allows, and what came before
was right. *wrong*: everything else, and sessions or pages that are left over afterwards. During a rolling upgrade
every question is asked again until it is over; *asked again* are requests that a device whose pod is just being
replaced did not accept. Resumes are the answers' `usage.hat.resumes`. The pause is the longest time between two
pieces of one answer. Meanwhile a second eviction is refused by the PodDisruptionBudget, which is checked too, and
at the end, when the devices leave, the cloud holds no session and no page.
"""


class Report:
    """What came of each fault so far; with HAT_WRITE_REPORT=1 also in docs/benchmarks/cluster_faults.md."""

    def __init__(self) -> None:
        self._about = facts(None, ("torch", "transformers", "grpcio", "kubernetes"))
        self._about["command"] = "`make full-cluster-faults`"
        self._tallies: list[Tally] = []

    def add(self, tally: Tally) -> None:
        """One more row; everything is written again, so that a run that is cut leaves what it saw."""
        self._tallies.append(tally)
        if os.environ.get("HAT_WRITE_REPORT") == "1":
            PAGE.write_text(report("Faults on a cluster", ABOUT, self._about, self.table()))

    def table(self) -> str:
        """A row for each fault."""
        columns = ["mode", "fault", "answers", "exact", "told", "wrong", "asked again", "resumes"]
        rows = [
            [
                *(tally.mode, tally.name, tally.exact + tally.told + len(tally.wrong)),
                *(tally.exact, tally.told, len(tally.wrong), tally.refusals, tally.resumes),
                *(f"{tally.pause_s:.1f}", f"{tally.seconds:.0f}"),
            ]
            for tally in self._tallies
        ]
        return table([*columns, "pause (s)", "seconds"], rows)


@pytest.fixture(scope="module")
def seen() -> Iterator[Report]:
    found = Report()
    yield found
    print(f"\n{found.table()}")


@pytest.fixture(scope="module")
def devices(product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    with more_nodes(product, tmp_path_factory.mktemp) as found:
        yield found


@pytest.fixture(scope="module", params=MODES)
def there(
    request: pytest.FixtureRequest,
    product: Product,
    devices: list[Node],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Scene]:
    with scene(product, devices, request.param, tmp_path_factory.mktemp) as made:
        yield made


@pytest.fixture(scope="module")
def want(there: Scene, seen: Report) -> Mapping[int, Reply]:
    """Each answer without a fault."""
    began = time.monotonic()
    replies = there.ask(BODIES).join(ANSWERS_S)
    for reply in replies:
        assert not reply.error, f"answer {reply.number}: {reply.error}"
        assert reply.tokens > NEW // 4, f"answer {reply.number} has {reply.tokens} tokens only"
    assert len({reply.text for reply in replies}) == ANSWERS
    found = {reply.number: reply for reply in replies}
    calm = Tally(there.mode, "none", seconds=time.monotonic() - began)
    for reply in replies:
        calm.add(reply, found[reply.number], ())
    seen.add(calm)
    return found


@pytest.mark.parametrize("name", FAULTS)
def test_answers_go_on(there: Scene, want: Mapping[int, Reply], seen: Report, name: str) -> None:
    """Every answer is the uninterrupted one, or ends with an error where the contract says so; nothing is left."""
    fault = FAULTS[name]
    tally = struck(there, name, BODIES, want, fault.strike, fault.again, fault.allowed)
    there.wait_serving()
    try:
        there.product.wait("nothing is left over", lambda: not there.left_over(LONGEST), LEFT_S)
    except AssertionError:
        tally.wrong.append(f"left over: {there.left_over(LONGEST)}")
    print(f"{there.mode}: {name}: {tally}")
    seen.add(tally)
    assert not tally.wrong
    assert tally.exact >= ANSWERS - tally.told
    if fault.resumed:
        assert tally.resumes, "no answer had to go on elsewhere: the fault struck nothing"


def test_nothing_is_left_when_devices_leave(there: Scene, want: Mapping[int, Reply]) -> None:
    """Not a session, not a page: the kept conversations go with their devices."""
    edge, nodes = there.product.edge, [node.name for node in there.product.edge.nodes]
    for node in nodes:
        edge.kubectl("label", "node", node, "hat.dev/device-")

    def empty() -> bool:
        figures = [there.figures("cloud", pod) for pod in there.pods("cloud")]
        names = ("hat_num_sessions_open", "hat_num_sessions_lost", "hat_kv_cache_usage_ratio")
        return len(figures) == REPLICAS and not any(one[name] for one in figures for name in names)

    try:
        there.product.wait("no device", lambda: not there.all_pods("edge"), 180)
        there.product.wait("the cloud holds nothing", empty, LEFT_S)
    finally:
        for node in nodes:
            edge.kubectl("label", "node", node, "hat.dev/device=true")
