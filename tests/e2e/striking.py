"""What strikes a HatDeployment in the middle of answers, and what came of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.product import TEAM, Product
from tests.e2e.replicas import NAME, READY_S, SIDES, Scene, Side
from tests.e2e.streams import Reply

ANSWERS_S = 600.0


@dataclass
class Tally:
    """What came of a fault."""

    mode: str
    name: str
    exact: int = 0
    told: int = 0
    """Ended with an error that the contract allows; what came before it was right."""
    wrong: list[str] = field(default_factory=list)
    resumes: int = 0
    refusals: int = 0
    pause_s: float = 0.0
    seconds: float = 0.0

    def add(self, reply: Reply, want: Reply, allowed: Sequence[str]) -> None:
        """Counts an answer, which should be `want`; `allowed` are the errors that it may end with instead."""
        self.resumes += reply.resumes
        self.refusals += reply.refusals
        self.pause_s = max(self.pause_s, reply.pause_s)
        right = want.text.startswith(reply.text)
        if reply.finish and (reply.text, reply.finish, reply.tokens) == (want.text, want.finish, want.tokens):
            self.exact += 1
        elif reply.error in allowed and right:
            self.told += 1
        else:
            self.wrong.append(
                f"answer {reply.number}: {len(reply.text)} of {len(want.text)} characters, "
                f"{'a prefix' if right else 'another text'}, {reply.tokens} of {want.tokens} tokens, "
                f"finish {reply.finish!r}, error {reply.error!r}"
            )


def delete_by_force(there: Scene) -> None:
    """`kubectl delete pod --grace-period=0 --force` of the busiest replica."""
    _delete(there, "--grace-period=0", "--force")


def delete(there: Scene) -> None:
    """`kubectl delete pod` of the busiest replica: SIGTERM after its pause, then it drains."""
    _delete(there)


def _delete(there: Scene, *how: str) -> None:
    name = there.busiest()["metadata"]["name"]
    there.product.cloud.kubectl("-n", TEAM, "delete", "pod", name, "--wait=false", *how)


def kill(there: Scene) -> None:
    """SIGKILL to the process of the busiest replica, from its node: Kubernetes starts it again."""
    pod = there.busiest()
    (status,) = pod["status"]["containerStatuses"]
    (node,) = [one for one in there.product.cloud.nodes if one.name == pod["spec"]["nodeName"]]
    node.kill_container(status["containerID"].removeprefix("containerd://"))


def drain_node(there: Scene) -> None:
    """`kubectl drain` of the busiest replica's node, then `kubectl uncordon`.

    Meanwhile the other replica cannot be evicted: the PodDisruptionBudget allows one at a time.
    """
    product, pod = there.product, there.busiest()
    node = pod["spec"]["nodeName"]
    (other,) = [one for one in there.pods("cloud") if one["metadata"]["uid"] != pod["metadata"]["uid"]]
    kubectl = product.cloud.kubectl
    try:
        kubectl("cordon", node)
        # The budget follows the replicas that serve, a moment later.
        product.wait("the first replica is evicted", lambda: not _evict(product, pod), 60)
        refused = _evict(product, other)
        assert "disruption budget" in refused, refused or "the second replica was evicted as well"
        drain = ("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=50s")
        product.wait("the node is drained", lambda: kubectl(*drain, check=False).returncode == 0, READY_S)
    finally:
        kubectl("uncordon", node)


def _evict(product: Product, pod: Mapping[str, Any]) -> str:
    """What the API server says to an eviction; "" where it is done."""
    meta = pod["metadata"]
    names = {"name": meta["name"], "namespace": meta["namespace"]}
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": names}
    path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}/eviction"
    done = product.cloud.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(body), check=False)
    return done.stderr if done.returncode else ""


def roll(there: Scene, change: Mapping[str, Any], sides: Sequence[Side]) -> None:
    """A change of the spec; returns when pods of these sides are all new, and those of the other side are not."""
    before = {side: set(there.all_pods(side)) for side in SIDES}
    there.product.patch(NAME, change)
    for side in sides:
        there.product.wait(
            f"no pod of {side} is left as it was",
            lambda side=side: not before[side] & set(there.all_pods(side)),  # type: ignore[misc]
            READY_S,
        )
    there.wait_serving()
    for side in SIDES:
        if side not in sides:
            assert before[side] == set(there.all_pods(side)), f"{side} was rolled too"


def struck(
    there: Scene,
    name: str,
    bodies: Sequence[Mapping[str, Any]],
    want: Mapping[int, Reply],
    strike: Callable[[Scene], None],
    again: bool,
    allowed: Sequence[str],
) -> Tally:
    """Answers, with something that strikes when a third of them is there; `again`: asked again until it is over."""
    tally, began = Tally(there.mode, name), time.monotonic()
    streams = there.ask(bodies, again)
    try:
        enough = sum(reply.pieces for reply in want.values()) // 3

        def ripe() -> bool:
            return streams.pieces >= enough and all(reply.pieces or reply.over for reply in streams.now())

        there.product.wait("a third of the answers is there", ripe, ANSWERS_S)
        assert sum(not reply.over for reply in streams.now()) > len(bodies) // 2, "most answers have ended"
        strike(there)
        streams.stop()
        for reply in streams.join(ANSWERS_S):
            tally.add(reply, want[reply.number], allowed)
    finally:
        streams.kill()
    tally.seconds = time.monotonic() - began
    return tally
