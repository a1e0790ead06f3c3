from __future__ import annotations

import copy
from typing import Any

import pytest

from hat_operator import names
from hat_operator.desired import Desired, Observed, cloud_endpoint
from hat_operator.spec import HatDeployment
from tests.unit.operator.changes import BALANCED, CHANGES, CLAIM, FAR, WEIGHTS, WITHOUT_OBJECTS, leaves
from tests.unit.operator.restricted import pods, violations
from tests.unit.operator.samples import (
    HUB,
    SCHEMA,
    SETTINGS,
    body,
    by_name,
    desired,
    hat,
    main,
    of_kind,
    one,
    option,
)
from tests.unit.operator.test_schema import change

POD_MONITOR = "monitoring.coreos.com/v1/PodMonitor"


def test_the_two_tables_name_every_field() -> None:
    assert set(leaves(SCHEMA["properties"]["spec"])) == set(CHANGES) | set(WITHOUT_OBJECTS)


@pytest.mark.parametrize("path", CHANGES)
def test_every_field_changes_an_object(path: str) -> None:
    value, around = CHANGES[path]
    edge = copy.deepcopy(around.get("edge", {}))
    spec = copy.deepcopy({key: item for key, item in around.items() if key != "edge"})
    before = desired(hat(edge=edge, **spec), cloud_endpoint="lb:7070")
    if path == "cloud.accelerator.type":
        change(spec, "cloud.accelerator.count", 0)
    if path.startswith("edge."):
        change(edge, path.removeprefix("edge."), value)
    else:
        spec.setdefault("model", {"source": dict(HUB)})
        change(spec, path, value)
    after = desired(hat(edge=edge, **spec), cloud_endpoint="lb:7070")
    assert (before.cloud, before.edge) != (after.cloud, after.edge)
    if path.startswith("edge.") and not path.startswith("edge.api.port"):
        assert before.cloud == after.cloud


def every_kind() -> list[HatDeployment]:
    return [
        hat(),
        hat(edge=FAR, cloud={**BALANCED, "accelerator": {"type": "nvidia.com/gpu", "count": 1}}),
        hat(edge=WEIGHTS, model={"source": CLAIM}),
        hat(
            edge={
                "images": [{"name": "orin", "l4t": "r36.4"}, {"name": "pi"}],
                "accelerator": {"type": "cuda"},
                "runtimeClassName": "nvidia",
                "api": {"keySecretRef": {"name": "k"}},
            },
            model={"source": HUB, "tokenSecretRef": {"name": "t"}},
        ),
    ]


@pytest.mark.parametrize("wanted", every_kind(), ids=range(4))
def test_every_pod_keeps_to_the_restricted_standard(wanted: HatDeployment) -> None:
    found = desired(wanted, cloud_endpoint="lb:7070")
    seen = dict(pods(found.cloud + found.edge))
    assert len(seen) >= 2
    assert {name: violations(spec) for name, spec in seen.items()} == {name: [] for name in seen}
    for spec in seen.values():
        assert spec["automountServiceAccountToken"] is False
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert "memory" in container["resources"]["limits"]
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted <= {volume["name"] for volume in spec["volumes"]}
            assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_the_validator_refuses_what_the_standard_refuses() -> None:
    open_pod: dict[str, Any] = {
        "hostNetwork": True,
        "volumes": [{"name": "h", "hostPath": {"path": "/"}}],
        "containers": [{"name": "c", "securityContext": {"privileged": True, "runAsUser": 0}}],
    }
    assert len(violations(open_pod)) == 7


@pytest.mark.parametrize("wanted", every_kind(), ids=range(4))
def test_labels_names_and_determinism(wanted: HatDeployment) -> None:
    found = desired(wanted, cloud_endpoint="lb:7070", apis=frozenset({POD_MONITOR}))
    for component, objects in (("cloud", found.cloud), ("edge", found.edge)):
        assert len(by_name(objects)) == len(objects)
        for thing in objects:
            assert thing["metadata"]["labels"].items() >= names.labels(wanted, component).items()
    again = desired(copy.deepcopy(wanted), cloud_endpoint="lb:7070", apis=frozenset({POD_MONITOR}))
    assert again == found


def test_labels_of_users_do_not_replace_ours() -> None:
    wanted = hat()
    object.__setattr__(wanted.spec.cloud.template, "labels", {names.LABEL_REVISION: "x"})
    thing = one(desired(wanted).cloud, "Deployment")
    assert thing["spec"]["template"]["metadata"]["labels"][names.LABEL_REVISION] == names.revision(
        wanted, SETTINGS
    )


def test_a_new_revision_starts_beside_the_serving_one_and_takes_over_when_ready() -> None:
    old, new = hat(), hat(split={"inputLayers": 4})
    old_revision, new_revision = names.revision(old, SETTINGS), names.revision(new, SETTINGS)
    before = desired(old, serving_revision=old_revision)
    during = desired(new, serving_revision=old_revision)
    after = desired(new, serving_revision=new_revision)

    (old_deployment,) = of_kind(before.cloud, "Deployment")
    old_service = services(before)[f"chat-cloud-{old_revision}"]
    (old_daemonset,) = of_kind(before.edge, "DaemonSet")
    assert one(during.cloud, "Deployment")["metadata"]["name"] == f"chat-cloud-{new_revision}"
    assert during.keeps(old_deployment)
    assert during.keeps(old_service)
    assert selected(during, "chat-cloud") == old_revision
    assert selected(during, f"chat-cloud-{new_revision}") == new_revision
    assert of_kind(during.edge, "DaemonSet") == []
    assert during.keeps(old_daemonset)

    assert selected(after, "chat-cloud") == new_revision
    daemonset = one(after.edge, "DaemonSet")
    assert daemonset["spec"]["template"]["metadata"]["labels"][names.LABEL_REVISION] == new_revision
    assert option(main(daemonset), "--cloud") == f"chat-cloud-{new_revision}.team.svc:7070"
    for thing in (old_deployment, old_service, old_daemonset):
        assert not after.keeps(thing)
    draining = desired(new, serving_revision=new_revision, draining=frozenset({old_revision}))
    assert draining.keeps(old_deployment)
    assert draining.keeps(old_service)


def services(found: Desired) -> dict[str, dict[str, Any]]:
    return {thing["metadata"]["name"]: thing for thing in of_kind(found.cloud, "Service")}


def selected(found: Desired, service: str) -> str:
    return str(services(found)[service]["spec"]["selector"][names.LABEL_REVISION])


def test_a_kept_revisions_service_is_made_again_but_never_changed() -> None:
    old, new = hat(), hat(split={"inputLayers": 4}, cloud={"expose": {"port": 9000}})
    revision = names.revision(old, SETTINGS)
    kept = f"chat-cloud-{revision}"
    during: dict[str, Any] = {"serving_revision": revision}
    assert kept not in services(desired(new, **during, endpoints={revision: "chat:7070"}))
    assert selected(desired(new, **during), kept) == revision


@pytest.mark.parametrize(
    ("edge", "expose", "types"),
    [
        ({}, {}, {"chat-cloud": "ClusterIP", "REVISION": "ClusterIP"}),
        ({}, {"type": "LoadBalancer"}, {"chat-cloud": "LoadBalancer", "REVISION": "ClusterIP"}),
        (FAR, {"type": "NodePort", "host": "h"}, {"chat-cloud": "NodePort", "REVISION": "NodePort"}),
        ({}, {"type": "NodePort", "host": "h"}, {"chat-cloud": "NodePort", "REVISION": "NodePort"}),
        # One address for all revisions, so one Service.
        (FAR, {"type": "NodePort", "host": "h", "nodePort": 30070}, {"chat-cloud": "NodePort"}),
        (FAR, {"type": "LoadBalancer"}, {"chat-cloud": "LoadBalancer"}),
        (FAR, {"type": "ClusterIP", "host": "h"}, {"chat-cloud": "ClusterIP"}),
    ],
)
def test_services_by_kind_of_address(
    edge: dict[str, Any], expose: dict[str, Any], types: dict[str, str]
) -> None:
    wanted = hat(edge=edge, cloud={"expose": expose})
    found = services(desired(wanted))
    revision = names.revision(wanted, SETTINGS)
    assert {name.replace(revision, "REVISION"): thing["spec"]["type"] for name, thing in found.items()} == {
        name.replace("REVISION", "chat-cloud-REVISION"): kind for name, kind in types.items()
    }
    fixed = [port for thing in found.values() for port in thing["spec"]["ports"] if "nodePort" in port]
    assert len(fixed) == ("nodePort" in expose)


def test_devices_of_each_revision_dial_its_node_port_and_may_reach_all() -> None:
    expose = {"expose": {"type": "NodePort", "host": "h"}}
    old, new = hat(edge=FAR, cloud=expose), hat(edge=FAR, cloud=expose, split={"inputLayers": 4})
    first, second = (names.revision(wanted, SETTINGS) for wanted in (old, new))
    endpoints = {first: "h:30001", second: "h:30002"}
    assert of_kind(desired(old).edge, "DaemonSet") == []
    after = desired(
        new,
        serving_revision=second,
        endpoints=endpoints,
        draining=frozenset({first}),
        cloud_endpoint="h:30000",
    )
    assert option(main(one(after.edge, "DaemonSet")), "--cloud") == "h:30002"
    rules = one(after.edge, "NetworkPolicy")["spec"]["egress"]
    ports = {port["port"] for rule in rules for port in rule["ports"]}
    assert {30001, 30002} <= ports
    assert 30000 not in ports
    assert cloud_endpoint(new, Observed(endpoints=endpoints), first) == "h:30001"


def test_a_revision_that_was_overtaken_is_not_kept() -> None:
    first, second, third = (hat(split={"inputLayers": layers}) for layers in (3, 4, 5))
    (overtaken,) = of_kind(desired(second).cloud, "Deployment")
    assert not desired(third, serving_revision=names.revision(first, SETTINGS)).keeps(overtaken)


def test_without_a_serving_revision_everything_is_made_at_once() -> None:
    found = desired(hat())
    assert len(of_kind(found.edge, "DaemonSet")) == 1
    assert found.keep_revisions == frozenset()
    assert not found.keep_daemonsets


def test_only_what_has_the_serving_revision_is_kept() -> None:
    during = desired(hat(split={"inputLayers": 4}), serving_revision=names.revision(hat(), SETTINGS))
    for thing in desired(hat()).cloud:
        own = thing["kind"] in ("Deployment", "Service") and thing["metadata"]["name"] != "chat-cloud"
        assert during.keeps(thing) == own


@pytest.mark.parametrize("serving", ["00000000", None])
def test_suspend_stops_all_pods_and_keeps_the_rest(serving: str | None) -> None:
    running, stopped = desired(hat()), desired(hat(suspend=True), serving_revision=serving)
    assert one(stopped.cloud, "Deployment")["spec"]["replicas"] == 0
    assert of_kind(stopped.edge, "DaemonSet") == []
    for thing in [*running.cloud, *running.edge]:
        assert not stopped.keeps(thing)
    kept = set(by_name(running.cloud + running.edge)) - {("DaemonSet", "chat-edge-cpu")}
    assert set(by_name(stopped.cloud + stopped.edge)) == kept


def test_devices_wait_for_the_load_balancers_address() -> None:
    wanted = hat(edge=FAR, cloud=BALANCED)
    unknown, known = desired(wanted), desired(wanted, cloud_endpoint="198.51.100.7:7070")
    assert of_kind(unknown.edge, "DaemonSet") == []
    daemonset = one(known.edge, "DaemonSet")
    assert option(main(daemonset), "--cloud") == "198.51.100.7:7070"
    assert unknown.keeps(daemonset)


def test_without_an_edge_there_is_only_the_cloud() -> None:
    cloud_only = body()
    del cloud_only["spec"]["edge"]
    found = desired(HatDeployment.parse(cloud_only))
    assert found.edge == []
    assert not found.keeps(one(desired(hat()).edge, "DaemonSet"))


@pytest.mark.parametrize(
    ("wish", "api", "made"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("enabled", False, True),
        ("disabled", True, False),
    ],
)
def test_pod_monitor(wish: str, api: bool, made: bool) -> None:
    apis = frozenset({POD_MONITOR}) if api else frozenset()
    found = desired(hat(observability={"podMonitor": wish}), apis=apis)
    assert [len(of_kind(side, "PodMonitor")) for side in (found.cloud, found.edge)] == [int(made)] * 2


def test_another_cluster_is_asked_for_its_own_apis() -> None:
    wanted = hat(edge=FAR, cloud=BALANCED)
    apis = frozenset({POD_MONITOR})
    assert of_kind(desired(wanted, apis=apis).edge, "PodMonitor") == []
    assert len(of_kind(desired(wanted, edge_apis=apis).edge, "PodMonitor")) == 1
