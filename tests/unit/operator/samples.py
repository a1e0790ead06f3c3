"""HatDeployments for tests, and the way from their text fields to objects."""

from __future__ import annotations

from typing import Any

from hat_operator.desired import Desired, Observed, desired_objects
from hat_operator.schema import apply_defaults, load_schema, problems
from hat_operator.settings import Settings
from hat_operator.spec import HatDeployment

SETTINGS = Settings(registry="", version="1.2.3")
SCHEMA = load_schema()
HUB = {"hub": "org/model"}
EDGE = {"deviceSelector": {"matchLabels": {"hat.dev/device": "true"}}}
REMOTE = {"kubeconfigSecretRef": {"name": "jetsons"}, "namespace": "far"}

Objects = dict[tuple[str, str], dict[str, Any]]


def body(edge: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    """A defaulted object; `edge` adds to the smallest edge, other fields replace those of the smallest spec."""
    written: dict[str, Any] = {
        "model": {"source": HUB},
        "split": {"inputLayers": 3},
        "edge": {**EDGE, **(edge or {})},
        **spec,
    }
    found = {
        "apiVersion": "hat.dev/v1alpha1",
        "kind": "HatDeployment",
        "metadata": {"name": "chat", "namespace": "team", "uid": "u-1", "generation": 4},
        "spec": {key: value for key, value in written.items() if value is not None},
    }
    defaulted: dict[str, Any] = apply_defaults(SCHEMA, found)
    return defaulted


def hat(edge: dict[str, Any] | None = None, **spec: Any) -> HatDeployment:
    """The same as a HatDeployment; it must be valid."""
    found = body(edge, **spec)
    assert problems(SCHEMA, found) == []
    return HatDeployment.parse(found)


def desired(wanted: HatDeployment, **observed: Any) -> Desired:
    return desired_objects(wanted, SETTINGS, Observed(**observed))


def by_name(objects: list[dict[str, Any]]) -> Objects:
    """Objects by kind and name."""
    return {(thing["kind"], thing["metadata"]["name"]): thing for thing in objects}


def of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [thing for thing in objects if thing["kind"] == kind]


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = of_kind(objects, kind)
    return found


def pod(thing: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = thing["spec"]["template"]["spec"]
    return spec


def fetching(thing: dict[str, Any]) -> list[dict[str, Any]]:
    """The init containers that end; the one that keeps the certificate goes on."""
    return [item for item in pod(thing).get("initContainers", ()) if item.get("restartPolicy") != "Always"]


def main(thing: dict[str, Any]) -> dict[str, Any]:
    """The container that serves."""
    (container,) = pod(thing)["containers"]
    assert isinstance(container, dict)
    return container


def option(container: dict[str, Any], name: str) -> str:
    """Value of a command-line option."""
    args = container["args"]
    return str(args[args.index(name) + 1])
