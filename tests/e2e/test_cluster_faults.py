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

import tests.benchmark_modules  # noqa: F401
from tests.e2e.product import Product
from tests.e2e.streams import Reply
from tests.e2e.striking import (
    LEFT_S,
    NAME,
    Scene,
    Tally,
    delete,
    delete_by_force,
    drain_node,
    kill,
    roll,
    scene,
    struck,
)

pytestmark = [pytest.mark.timeout(1800), pytest.mark.default_model, pytest.mark.long]
ANSWERS = int(os.environ.get("HAT_FAULT_ANSWERS", "20"))
NEW = 160
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


@pytest.fixture(scope="module")
def tallies() -> Iterator[list[Tally]]:
    """What came of each fault; printed, and with HAT_WRITE_REPORT=1 written to docs/benchmarks/cluster_faults.md."""
    from common import facts, report, table

    about, found = facts(None), list[Tally]()
    yield found
    columns = ["mode", "fault", "answers", "exact", "told", "wrong", "asked again", "resumes", "pause (s)"]
    rows = [
        [
            *("hat", tally.name, tally.exact + tally.told + len(tally.wrong)),
            *(tally.exact, tally.told, len(tally.wrong), tally.refusals, tally.resumes),
            *(f"{tally.pause_s:.1f}", f"{tally.seconds:.0f}"),
        ]
        for tally in found
    ]
    results = table([*columns, "seconds"], rows)
    print(f"\n{results}")
    if os.environ.get("HAT_WRITE_REPORT") == "1":
        about["command"] = "`make full-cluster-faults`"
        PAGE.write_text(report("Faults on a cluster", ABOUT, about, results))


@pytest.fixture(scope="module")
def there(product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(product, tmp_path_factory.mktemp) as made:
        yield made


@pytest.fixture(scope="module")
def want(there: Scene, tallies: list[Tally]) -> Mapping[int, Reply]:
    """Each answer without a fault."""
    began = time.monotonic()
    replies = there.ask(BODIES).join(600)
    for reply in replies:
        assert not reply.error, f"answer {reply.number}: {reply.error}"
        assert reply.tokens > NEW // 4, f"answer {reply.number} has {reply.tokens} tokens only"
    assert len({reply.text for reply in replies}) == ANSWERS
    found = {reply.number: reply for reply in replies}
    calm = Tally("none", seconds=time.monotonic() - began)
    for reply in replies:
        calm.add(reply, found[reply.number], ())
    tallies.append(calm)
    return found


@pytest.mark.parametrize("name", FAULTS)
def test_answers_go_on(there: Scene, want: Mapping[int, Reply], tallies: list[Tally], name: str) -> None:
    """Every answer is the uninterrupted one, or ends with an error where the contract says so; nothing is left."""
    fault = FAULTS[name]
    tally = struck(there, name, BODIES, want, fault.strike, fault.again, fault.allowed)
    tallies.append(tally)
    print(f"{name}: {tally}")
    there.wait_serving()
    try:
        there.product.wait("nothing is left over", lambda: not there.left_over(LONGEST), LEFT_S)
    except AssertionError:
        tally.wrong.append(f"left over: {there.left_over(LONGEST)}")
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
        return len(figures) == 2 and not any(one[name] for one in figures for name in names)

    try:
        there.product.wait("no device", lambda: not there.all_pods("edge"), 180)
        there.product.wait("the cloud holds nothing", empty, LEFT_S)
    finally:
        edge.kubectl("label", "node", edge.node.name, "hat.dev/device=true")
