"""Conditions, device rows and the patches made of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hat_operator import status
from hat_operator.devices import MAX_ROWS, fleet, revisions_in_use, unavailable
from hat_operator.spec import HatDeployment
from hat_operator.status import CloudSeen, EdgeSeen, MetricsSeen, Problem
from tests.unit.operator.bodies import body

NOW, LATER = "2026-01-01T00:00:00Z", "2026-01-01T01:00:00Z"
CLOUD = CloudSeen("aaaa", "aaaa", replicas=1, ready=1, endpoint="h:1")


def hat(remote: bool = True, **spec: Any) -> HatDeployment:
    edge: dict[str, Any] = {"deviceSelector": {"matchLabels": {"device": "1"}}}
    if remote:
        edge["clusterRef"] = {"kubeconfigSecretRef": {"name": "site"}}
        spec.setdefault("cloud", {"expose": {"type": "LoadBalancer"}})
    return HatDeployment.parse(body("chat", edge=edge, **spec))


def node(name: str, ready: str = "True", **labels: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": labels},
        "status": {"conditions": [{"type": "Ready", "status": ready}]},
    }


def pod(on: str, ready: str = "True", phase: str = "Running", revision: str = "aaaa") -> dict[str, Any]:
    return {
        "metadata": {"name": f"p-{on}", "labels": {"hat.dev/revision": revision}},
        "spec": {"nodeName": on},
        "status": {"phase": phase, "conditions": [{"type": "Ready", "status": ready}]},
    }


def phases(*arguments: Any) -> dict[str, str]:
    return {row["name"]: row["phase"] for row in fleet(*arguments).rows}


def test_phases_of_devices() -> None:
    nodes = [node("a"), node("b"), node("c", "Unknown"), node("d"), node("e")]
    pods = [pod("a"), pod("b", "False"), pod("c"), pod("d", "False", "Pending")]
    expected = {"a": "Ready", "b": "NotReady", "c": "Lost", "d": "Pending", "e": "Pending"}
    assert phases(pods, nodes, [], NOW) == expected


def test_without_nodes_devices_are_those_with_pods_even_unscheduled_ones() -> None:
    waiting = pod("x", "False", "Pending")
    field = {"key": "metadata.name", "operator": "In", "values": ["z"]}
    required = {"nodeSelectorTerms": [{"matchFields": [field]}]}
    waiting["spec"] = {
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
    }
    assert phases([pod("a"), waiting], None, [], NOW) == {"a": "Ready", "z": "Pending"}


def test_last_seen_moves_only_with_the_phase() -> None:
    first = fleet([pod("a"), pod("b")], None, [], NOW).rows
    second = {row["name"]: row for row in fleet([pod("a"), pod("b", "False")], None, first, LATER).rows}
    assert second["a"]["lastSeen"] == NOW
    assert second["b"]["lastSeen"] == LATER


def test_figures_stay_with_their_device_whatever_its_phase() -> None:
    before = [
        {"name": "a", "phase": "Ready", "lastSeen": NOW, "chunkSize": 128, "uplinkMbps": 60.1},
        {"name": "gone", "phase": "Ready", "lastSeen": NOW, "acceptance": 0.5},
    ]
    rows = fleet([], [node("a", "Unknown"), node("b")], before, LATER).rows
    assert rows == [
        {"name": "a", "node": "a", "phase": "Lost", "lastSeen": LATER, "chunkSize": 128, "uplinkMbps": 60.1},
        {"name": "b", "node": "b", "phase": "Pending", "lastSeen": LATER},
    ]


def test_rows_are_bounded_and_show_the_trouble_first() -> None:
    pods = [pod(f"n{index:04}") for index in range(300)] + [pod("z", "False")]
    found = fleet(pods, None, [], NOW)
    assert (len(found.rows), found.wanted, found.ready) == (MAX_ROWS, 301, 300)
    assert found.rows[0]["name"] == "z"


def test_old_revisions_are_in_use_on_devices_that_answer() -> None:
    pods = [pod("a", revision="old"), pod("b", revision="gone"), pod("c", revision="new")]
    assert revisions_in_use(pods, [node("a"), node("b", "Unknown"), node("c")]) == {"old", "new"}


def test_devices_that_are_off_leave_a_tenth_of_the_others_to_an_update() -> None:
    def kind(name: str, thing: dict[str, Any]) -> dict[str, Any]:
        thing["metadata"].setdefault("labels", {})["hat.dev/image"] = name
        return thing

    def allowed(updated: int, *off: str, wanted: int = 12) -> dict[str, int]:
        status = {"desiredNumberScheduled": wanted, "updatedNumberScheduled": updated}
        daemonset = kind("pc", {"metadata": {"name": "chat-edge-pc"}, "status": status})
        nodes = [node(name, "Unknown" if name in off else "True") for name in ("o", *names)]
        return unavailable([daemonset], pods, nodes)

    names = [f"n{index}" for index in range(12)]
    pods = [kind("pc", pod(name)) for name in names] + [kind("orin", pod("o"))]
    assert allowed(3, "n0") == {"chat-edge-pc": 1 + 2}
    # Kubernetes does not count those that are off, as soon as they are tainted.
    assert allowed(3, "n0", "n1", "n2", wanted=9) == {"chat-edge-pc": 3 + 1}
    assert allowed(3, *names) == {"chat-edge-pc": 12}
    # A tenth of all is the same; another DaemonSet's device; nothing to update; nobody knows.
    assert allowed(3) == allowed(3, "o") == allowed(12, "n0") == allowed(11, "n0", wanted=11) == {}
    waiting = {"desiredNumberScheduled": 12}
    assert unavailable([kind("pc", {"metadata": {"name": "d"}, "status": waiting})], pods, None) == {}
    assert unavailable([kind("pc", {"metadata": {"name": "d"}})], pods, [node("n0", "Unknown")]) == {}


def test_all_ready() -> None:
    seen = EdgeSeen(fleet([pod("a")], [node("a")], [], NOW))
    found = status.findings(hat(), replace(CLOUD, metrics=MetricsSeen(telling=1, silent=1)), seen)
    assert {name: finding.status for name, finding in found.items()} == {
        "Ready": "True",
        "CloudReady": "True",
        "EdgeReady": "True",
        "EdgeClusterReachable": "True",
        "ModelSplitValid": "True",
        "MetricsAvailable": "True",
        "Progressing": "False",
    }


def test_missing_metrics_leave_it_ready() -> None:
    seen = EdgeSeen(fleet([pod("a")], [node("a")], [], NOW))

    def metrics(of: MetricsSeen, **spec: Any) -> tuple[str, str]:
        found = status.findings(hat(**spec), replace(CLOUD, metrics=of), seen)
        assert found["Ready"].status == ("True" if not spec else "False")
        return found["MetricsAvailable"].status, found["MetricsAvailable"].reason

    assert metrics(MetricsSeen(asked=1)) == metrics(MetricsSeen(silent=1, asked=1))
    assert metrics(MetricsSeen()) == ("Unknown", "NoReplicaAnswered")
    silent = MetricsSeen(silent=2, error="status 404")
    assert metrics(silent) == ("False", "PolicyFrozen")
    fixed = status.findings(hat(chunking={"mode": "fixed"}), replace(CLOUD, metrics=silent), seen)
    assert fixed["MetricsAvailable"].reason == "ReplicasSilent"
    assert metrics(MetricsSeen(), suspend=True) == ("Unknown", "Suspended")


def test_a_prometheus_server_is_named_with_what_it_said() -> None:
    seen = EdgeSeen(fleet([pod("a")], [node("a")], [], NOW))
    source = "the Prometheus server https://prometheus/tenant"

    def metrics(of: MetricsSeen, **spec: Any) -> tuple[str, str, str]:
        found = status.findings(hat(**spec), replace(CLOUD, metrics=of), seen)["MetricsAvailable"]
        return found.status, found.reason, found.message

    telling = metrics(MetricsSeen(telling=1, source=source))
    assert telling == ("True", "PrometheusTells", f"{source} tells of cloud and devices")
    silent = MetricsSeen(silent=1, error="it answers with status 401", source=source)
    state, reason, text = metrics(silent)
    assert (state, reason) == ("False", "PolicyFrozen")
    assert text.endswith(f"{source} tells nothing of cloud and devices: it answers with status 401")
    assert metrics(silent, chunking={"mode": "fixed"})[:2] == ("False", "PrometheusSilent")
    assert metrics(MetricsSeen(asked=1, source=source))[:2] == ("Unknown", "NoReplicaAnswered")


def test_a_new_process_keeps_what_is_said_of_metrics_until_it_knows() -> None:
    seen = EdgeSeen(fleet([pod("a")], [node("a")], [], NOW))
    telling = replace(CLOUD, metrics=MetricsSeen(telling=1))
    first = status.new_status(hat(), {}, telling, seen, NOW)
    assert status.new_status(hat(), first, CLOUD, seen, LATER) == first


def test_scaling_to_zero_is_no_warning_of_metrics() -> None:
    seen = EdgeSeen(fleet([pod("a")], [node("a")], [], NOW))
    first = status.new_status(hat(), {}, replace(CLOUD, metrics=MetricsSeen(telling=1)), seen, NOW)
    none = replace(CLOUD, metrics=MetricsSeen(), ready=0, replicas=0)
    second = status.new_status(hat(cloud={"replicas": 0}), first, none, seen, LATER)
    told = status.changes(first["conditions"], second["conditions"])
    (kind,) = (kind for kind, _, text in told if text.startswith("MetricsAvailable is "))
    assert kind == "Normal"


def test_ready_takes_the_first_failures_reason() -> None:
    away = EdgeSeen(unreachable=Problem("Unauthorized", "401"))
    found = status.findings(hat(), CLOUD, away)
    assert found["Ready"].reason == found["EdgeClusterReachable"].reason == "Unauthorized"
    assert (found["EdgeReady"].status, found["EdgeReady"].reason) == ("Unknown", "EdgeClusterUnreachable")
    waiting = status.findings(hat(), CloudSeen("aaaa", None), away)
    assert waiting["Ready"].reason == "WaitingForReplicas"


def test_a_lost_device_does_not_make_the_rest_unready() -> None:
    nodes = [node("a"), node("b", "Unknown")]
    found = status.findings(hat(), CLOUD, EdgeSeen(fleet([pod("a"), pod("b")], nodes, [], NOW)))
    assert found["EdgeReady"].status == "True"
    assert "1 lost" in found["EdgeReady"].message
    all_lost = status.findings(hat(), CLOUD, EdgeSeen(fleet([pod("b")], nodes[1:], [], NOW)))
    assert (all_lost["EdgeReady"].status, all_lost["EdgeReady"].reason) == ("False", "DevicesLost")


def test_pods_that_the_api_refuses_are_named_with_the_reason() -> None:
    cloud = CloudSeen("aaaa", None, replicas=1, refused="is forbidden: exceeded quota")
    seen = EdgeSeen(fleet([], [node("a")], [], NOW), refused="is forbidden: hostPort")
    found = status.findings(hat(), cloud, seen)
    assert (found["CloudReady"].status, found["CloudReady"].reason) == ("False", "PodsRefused")
    assert "exceeded quota" in found["CloudReady"].message
    assert (found["EdgeReady"].status, found["EdgeReady"].reason) == ("False", "PodsRefused")
    assert "hostPort" in found["EdgeReady"].message
    assert (found["Progressing"].status, found["Progressing"].reason) == ("True", "PodsRefused")


def test_blue_green_is_progress_while_the_old_one_serves() -> None:
    seen = CloudSeen("bbbb", "aaaa", replicas=1, ready=1, endpoint="h:1", updated=False)
    found = status.findings(hat(remote=False), seen, EdgeSeen(fleet([pod("a")], [node("a")], [], NOW)))
    assert (found["Progressing"].status, found["Progressing"].reason) == ("True", "NewRevisionStarting")
    assert found["Ready"].status == "True"
    assert "EdgeClusterReachable" not in found


def test_suspended() -> None:
    found = status.findings(hat(suspend=True), CLOUD, EdgeSeen())
    assert found["Ready"].reason == found["CloudReady"].reason == "Suspended"


def test_transition_time_stays_with_the_status() -> None:
    first = status.new_status(hat(), {}, CloudSeen("aaaa", None), EdgeSeen(), NOW)
    second = status.new_status(
        hat(), first, CloudSeen("aaaa", None, problem=Problem("X", "y")), EdgeSeen(), LATER
    )
    cloud = {item["type"]: item for item in second["conditions"]}["CloudReady"]
    assert (cloud["reason"], cloud["lastTransitionTime"]) == ("X", NOW)
    third = status.new_status(hat(), second, CLOUD, EdgeSeen(), LATER)
    assert {item["type"]: item for item in third["conditions"]}["CloudReady"]["lastTransitionTime"] == LATER


def test_the_same_state_makes_no_patch_and_no_event() -> None:
    first = status.new_status(hat(), {}, CLOUD, EdgeSeen(fleet([pod("a")], None, [], NOW)), NOW)
    again = EdgeSeen(fleet([pod("a")], None, first["devices"], LATER))
    second = status.new_status(hat(), first, CLOUD, again, LATER)
    assert status.merge_patch(first, second) == {}
    assert status.changes(first["conditions"], second["conditions"]) == []


def test_unreachable_devices_stay_as_they_were_known() -> None:
    first = status.new_status(hat(), {}, CLOUD, EdgeSeen(fleet([pod("a")], None, [], NOW)), NOW)
    second = status.new_status(hat(), first, CLOUD, EdgeSeen(unreachable=Problem("Unreachable", "")), LATER)
    assert second["devices"] == first["devices"]


def test_merge_patch_removes_and_changes() -> None:
    old = {"a": 1, "b": {"c": 1, "d": 2}, "e": [1]}
    assert status.merge_patch(old, {"b": {"c": 1}, "e": [2]}) == {"a": None, "b": {"d": None}, "e": [2]}


def test_events_warn_about_what_is_lost() -> None:
    good = status.new_status(hat(), {}, CLOUD, EdgeSeen(fleet([pod("a")], None, [], NOW)), NOW)
    bad = status.new_status(
        hat(), good, CLOUD, EdgeSeen(unreachable=Problem("Unreachable", "no answer")), LATER
    )
    found = {reason: kind for kind, reason, _ in status.changes(good["conditions"], bad["conditions"])}
    assert found == {"Unreachable": "Warning", "EdgeClusterUnreachable": "Warning"}
    back = {kind for kind, _, _ in status.changes(bad["conditions"], good["conditions"])}
    assert back == {"Normal"}
