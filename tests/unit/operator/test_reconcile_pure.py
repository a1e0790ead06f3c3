"""Which objects need an apply, and how far a rollout is."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from hat_operator.diff import needs_apply
from hat_operator.rollout import deployment_done, live_endpoint, serving_revision
from hat_operator.spec import HatDeployment
from tests.unit.operator.bodies import body

DESIRED: dict[str, Any] = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "d", "labels": {"a": "1"}},
    "spec": {
        "replicas": 1,
        "template": {
            "spec": {
                "containers": [
                    {
                        "name": "c",
                        "image": "i",
                        "ports": [{"containerPort": 80}],
                        "resources": {"limits": {"memory": "1024Mi"}},
                        "env": [],
                    }
                ]
            }
        },
    },
}
OWNED = {
    "f:metadata": {"f:labels": {"f:a": {}}},
    "f:spec": {
        "f:replicas": {},
        "f:template": {
            "f:spec": {
                "f:containers": {
                    'k:{"name":"c"}': {
                        ".": {},
                        "f:name": {},
                        "f:image": {},
                        "f:ports": {
                            'k:{"containerPort":80,"protocol":"TCP"}': {".": {}, "f:containerPort": {}}
                        },
                        "f:resources": {"f:limits": {"f:memory": {}}},
                    }
                }
            }
        },
    },
}


def live() -> dict[str, Any]:
    found = copy.deepcopy(DESIRED)
    found["metadata"]["managedFields"] = [{"manager": "m", "operation": "Apply", "fieldsV1": OWNED}]
    found["status"] = {"readyReplicas": 1}
    container = found["spec"]["template"]["spec"]["containers"][0]
    container["ports"][0]["protocol"] = "TCP"
    container["resources"]["limits"]["memory"] = "1Gi"
    container["imagePullPolicy"] = "Always"
    del container["env"]
    return found


def test_defaults_and_other_spellings_are_no_difference() -> None:
    assert not needs_apply(DESIRED, live(), "m")


def test_a_changed_value_a_missing_one_and_a_foreign_manager_are() -> None:
    scaled, unlabelled = live(), live()
    scaled["spec"]["replicas"] = 2
    del unlabelled["metadata"]["labels"]["a"]
    assert needs_apply(DESIRED, scaled, "m")
    assert needs_apply(DESIRED, unlabelled, "m")
    assert needs_apply(DESIRED, live(), "another")


def test_a_field_that_is_no_longer_wanted_is_a_difference() -> None:
    less = copy.deepcopy(DESIRED)
    del less["metadata"]["labels"]["a"]
    assert needs_apply(less, live(), "m")
    less = copy.deepcopy(DESIRED)
    del less["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert needs_apply(less, live(), "m")


def test_what_others_added_stays() -> None:
    found = live()
    found["metadata"]["labels"]["b"] = "2"
    found["spec"]["template"]["spec"]["containers"].insert(0, {"name": "sidecar"})
    assert not needs_apply(DESIRED, found, "m")


def deployment(revision: str, ready: int, wanted: int = 2, seen: int = 1) -> dict[str, Any]:
    return {
        "kind": "Deployment",
        "metadata": {"generation": 1, "labels": {"hat.dev/revision": revision}},
        "spec": {"replicas": wanted},
        "status": {"observedGeneration": seen, "readyReplicas": ready, "updatedReplicas": wanted},
    }


def served(revision: str, ready: int) -> dict[str, Any]:
    """One whose replicas have all been ready."""
    found = deployment(revision, ready)
    reached = {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"}
    found["status"]["conditions"] = [{"type": "Available", "status": "False"}, reached]
    return found


def service(revision: str) -> dict[str, Any]:
    return {"spec": {"selector": {"hat.dev/revision": revision}}}


@pytest.mark.parametrize(
    ("new", "old", "selected", "expected"),
    [
        (None, None, None, None),
        (deployment("new", 2), None, "new", "new"),
        (deployment("new", 1), deployment("old", 2), "old", "old"),
        (deployment("new", 2), deployment("old", 2), "old", "new"),
        (deployment("new", 1), deployment("old", 0), "old", None),
        (deployment("new", 0), deployment("old", 0), "old", None),
        # All of its replicas restart at once, and nobody knows yet whether the new one ever starts.
        (deployment("new", 0), served("old", 0), "old", "old"),
        (None, served("old", 0), "old", "old"),
        (deployment("new", 1), served("old", 0), "old", None),
        (deployment("new", 2), served("old", 0), "old", "new"),
        # A replica of the serving revision that restarts is no reason to go back.
        (deployment("new", 1), deployment("old", 2), "new", "new"),
        (deployment("new", 0, wanted=0), deployment("old", 2), "old", "new"),
        (deployment("new", 0, wanted=0, seen=0), deployment("old", 2), "old", "old"),
    ],
)
def test_serving_revision(new: Any, old: Any, selected: str | None, expected: str | None) -> None:
    deployments = {name: obj for name, obj in (("new", new), ("old", old)) if obj is not None}
    found = None if selected is None else service(selected)
    assert serving_revision("new", deployments, found) == expected


@pytest.mark.parametrize(
    ("new", "old", "selected", "expected"),
    [
        (deployment("new", 2), None, None, "new"),
        (deployment("new", 2), None, "new", "new"),
        (deployment("new", 2), None, "old", "new"),
        (deployment("new", 2), deployment("old", 1), "old", "old"),
        (deployment("new", 2), deployment("old", 0), "old", "new"),
        (deployment("new", 2), served("old", 0), "old", "old"),
        (deployment("new", 1), served("old", 0), "old", "old"),
        (served("new", 0), served("old", 2), "new", "new"),
    ],
)
def test_devices_that_cannot_follow_keep_their_revision(
    new: Any, old: Any, selected: str | None, expected: str | None
) -> None:
    deployments = {name: obj for name, obj in (("new", new), ("old", old)) if obj is not None}
    found = None if selected is None else service(selected)
    assert serving_revision("new", deployments, found, devices_follow=False) == expected


def test_a_deployment_is_done_once_its_controller_has_seen_it() -> None:
    assert deployment_done(deployment("a", 2))
    assert not deployment_done(deployment("a", 2, seen=0))
    assert not deployment_done({"metadata": {"generation": 1}, "spec": {"replicas": 0}})


def test_endpoints_that_only_the_service_knows() -> None:
    balanced = HatDeployment.parse(body("c", cloud={"expose": {"type": "LoadBalancer", "port": 9000}}))
    assert live_endpoint(balanced, {"spec": {}, "status": {"loadBalancer": {}}}) is None
    ingress = {"spec": {}, "status": {"loadBalancer": {"ingress": [{"ip": "2001:db8::1"}]}}}
    assert live_endpoint(balanced, ingress) == "[2001:db8::1]:9000"
    node = HatDeployment.parse(body("c", cloud={"expose": {"type": "NodePort", "host": "h"}}))
    ports = {"spec": {"ports": [{"name": "grpc", "nodePort": 30070}]}}
    assert live_endpoint(node, ports) == "h:30070"
