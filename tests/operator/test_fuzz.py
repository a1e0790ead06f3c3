"""Mutated HatDeployments on a real apiserver: refused with a reason, or rendered without an exception."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest
from kubernetes import client as kube

from hat_operator.desired import Observed, desired_objects
from hat_operator.fields import SpecError
from hat_operator.schema import load_schema, problems
from hat_operator.settings import Settings
from hat_operator.spec import HatDeployment
from hat_operator.status import model_text
from hat_runtime.control.published import PublishedPolicy
from tests.fuzz.deployments import Deployments
from tests.fuzz.watch import Watch
from tests.harness.controlplane import ControlPlane
from tests.operator.manifests import (
    GROUP,
    PLURAL,
    QUOTAS,
    VERSION,
    changed,
    hat_deployment,
    token_mode,
    two_clusters,
)

SCHEMA = load_schema()
NODE = "$(HAT_NODE_NAME)"
"""The only variable of an argument, the operator's own: a device's identity has its node's name."""
PROGRAMS = {"hat", "sleep", "test"}
"""All that a pod may start."""
RIGHT = [
    hat_deployment(),
    hat_deployment(edge={"deviceSelector": {"matchLabels": {"hat.dev/device": "true"}}}),
    two_clusters(),
    token_mode(),
    changed(hat_deployment(), {"spec.cloud.quotas": QUOTAS}),
    changed(token_mode(), {"spec.speculation": {"draftModel": {"hub": "org/small"}}}),
]


class DryRun:
    """Creates that are checked by the apiserver and not kept."""

    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        self._client: kube.ApiClient = plane.client()
        query = urlencode({"dryRun": "All", "fieldValidation": "Strict"})
        path = f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}?{query}"
        settings = self._client.configuration.auth_settings().values()
        self._headers = {"Content-Type": "application/json", **{one["key"]: one["value"] for one in settings}}
        self._url = self._client.configuration.host + path

    def create(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and what the apiserver answered: the object with its defaults, or why not."""
        reply = self._client.rest_client.pool_manager.request(
            "POST",
            self._url,
            body=json.dumps(body).encode(),
            headers=self._headers,
        )
        return reply.status, json.loads(reply.data)


@pytest.fixture(scope="module")
def apiserver(control_plane: ControlPlane) -> Iterator[DryRun]:
    with control_plane.namespace() as name:
        yield DryRun(control_plane, name)


def commands(thing: Any) -> Iterator[str]:
    """The programs of all commands anywhere in an object."""
    if isinstance(thing, dict):
        if isinstance(thing.get("command"), list):
            yield thing["command"][0]
        thing = list(thing.values())
    if isinstance(thing, list):
        for item in thing:
            yield from commands(item)


def arguments(thing: Any) -> Iterator[str]:
    """The arguments of all containers anywhere in an object."""
    if isinstance(thing, dict):
        yield from thing.get("args", ())
        thing = list(thing.values())
    if isinstance(thing, list):
        for item in thing:
            yield from arguments(item)


def render(body: dict[str, Any]) -> str:
    """What became of an object that the apiserver takes."""
    assert problems(SCHEMA, {key: body[key] for key in ("apiVersion", "kind", "metadata", "spec")}) == []
    try:
        hat = HatDeployment.parse(body)
        desired = desired_objects(
            hat, Settings("registry", "9.9"), Observed("203.0.113.1:7070", policy=PublishedPolicy().to_json())
        )
    except SpecError as error:  # what the operator tells in the condition ModelSplitValid
        return "invalid by the operator" if error.path.startswith("spec.") else error.path
    assert len(model_text(hat)) <= SCHEMA["properties"]["status"]["properties"]["model"]["maxLength"]
    assert desired.cloud
    objects = [*desired.cloud, *desired.edge]
    json.dumps(objects, allow_nan=False)
    assert set(commands(objects)) <= PROGRAMS
    assert not [word for word in arguments(objects) if "$(" in word.replace(NODE, "")]
    return "rendered"


def bombard(apiserver: DryRun, watch: Watch) -> None:
    deployments = Deployments(watch.seed, SCHEMA, RIGHT)
    while watch.under_way:
        body = deployments.next()
        status, reply = apiserver.create(body)
        shown = json.dumps(body)[:1500]
        if status == 201:
            try:
                watch.count(1, render(reply))
            except Exception as error:
                raise AssertionError(f"seed {watch.seed}, object {watch.sent}: {shown}") from error
            continue
        assert status in (400, 422), f"{status}: {reply}: {shown}"
        assert reply["message"], shown
        watch.count(1, "refused")
    assert watch.outcomes.keys() <= {"rendered", "refused", "invalid by the operator"}
    assert watch.outcomes["rendered"] > watch.total // 10
    assert watch.outcomes["refused"] > watch.total // 10
    watch.end()


def test_fuzz_hatdeployments(apiserver: DryRun) -> None:
    bombard(apiserver, Watch("HatDeployments", seed=1, total=600))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_fuzz_many_hatdeployments(apiserver: DryRun) -> None:
    bombard(apiserver, Watch("HatDeployments", seed=2, total=5_000))
