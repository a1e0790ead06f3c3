"""What the pods of both sides have in common: security, probes, resources and the model's files."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hat_operator.fields import SpecError
from hat_operator.quantity import canonical
from hat_operator.sources import Claim
from hat_operator.spec import HatDeployment, Quantities, Resources, SecretKey, Template

USER = 10001
"""User and group of the images' processes; not root."""
VIDEO_GROUP = 44
"""Group of the GPU's device nodes on Jetson Linux."""
MODEL_FOLDER = "/model"
PREPARED_FOLDER = f"{MODEL_FOLDER}/part"
TOKEN_FOLDER = "/secrets/hub"  # noqa: S105 (a path)
START_S = 1800
"""A large model's weights may take this long from a slow volume to memory."""
LEAVE_S = 5
"""A pod that is to end still serves so long: until every node's Service leads clients elsewhere."""
ANSWER_S = 60
"""Answers that a device has begun may take so long after that."""
GPU = "nvidia.com/gpu"

CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "runAsUser": USER,
}


@dataclass(frozen=True)
class ModelFiles:
    """How a pod comes to the model, or the part of it, that it runs."""

    path: str
    """Folder inside the container."""
    volumes: list[dict[str, Any]]
    mounts: list[dict[str, Any]]
    init: list[dict[str, Any]] = field(default_factory=list)


def resources(wanted: Resources, path: str, cpu: str, memory: str, gpus: int = 0) -> dict[str, Any]:
    """Requests and limits of a container, in the API server's form.

    A request that is not written is the limit, or else the default (`cpu`, `memory`); a memory limit that is not
    written is the request. CPU stays unlimited unless written: a limit would only slow idle machines.

    Raises:
        SpecError: one of the quantities is none; `path` is where they lie in the spec.
    """
    limits = _canonical(wanted.limits, f"{path}.limits")
    requests = {
        "cpu": cpu,
        "memory": memory,
        **limits,
        **_canonical(wanted.requests, f"{path}.requests"),
    }
    limits.setdefault("memory", requests["memory"])
    if gpus:
        requests[GPU] = limits[GPU] = str(gpus)
    return {"requests": requests, "limits": limits}


def _canonical(quantities: Quantities, path: str) -> dict[str, str]:
    found = {}
    for name, value in quantities.items():
        try:
            found[name] = canonical(value)
        except ValueError as error:
            raise SpecError(f"{path}.{name}", value, str(error)) from error
    return found


def prepared_part(hat: HatDeployment, part: str) -> list[str]:
    """What `hat model prepare` is told to fetch of a model from a hub: `part` is cloud or device."""
    model = hat.spec.model
    source = model.hub or ""
    if model.revision and source != "default":
        source = f"{source}@{model.revision}"
    if hat.spec.input_layers is not None:
        return [source, "--part", part, "--input-layers", str(hat.spec.input_layers)]
    if part == "cloud":
        return [source]
    draft = hat.spec.speculation.draft_model
    return [source, "--part", "draft"] if draft is None else [draft.hub or ""]


def model_files(
    hat: HatDeployment, claim: Claim | None, wanted: Sequence[str], image: str, limits: Mapping[str, Any]
) -> ModelFiles:
    """The claim's folder, or an init container that fetches what one side needs.

    Args:
        hat: has the hub's token.
        claim: where the model lies ready; None for a model that is fetched.
        wanted: which that is (`prepared_part`).
        image: of the init container, the same as the pod's.
        limits: resources of the init container.
    """
    if claim is not None:
        volume = {"name": "model", "persistentVolumeClaim": {"claimName": claim.name, "readOnly": True}}
        mount = {"name": "model", "mountPath": MODEL_FOLDER, "readOnly": True}
        path = posixpath.normpath(posixpath.join(MODEL_FOLDER, claim.path))
        return ModelFiles(path, [volume], [mount])
    token = hat.spec.model.token
    volumes: list[dict[str, Any]] = [{"name": "model", "emptyDir": {}}]
    mounts: list[dict[str, Any]] = [{"name": "model", "mountPath": MODEL_FOLDER}]
    environment: dict[str, str] = {}
    secrets: list[dict[str, Any]] = []
    if token is not None:
        volumes.append(secret_volume("hub-token", token, "token"))
        secrets.append({"name": "hub-token", "mountPath": TOKEN_FOLDER, "readOnly": True})
        environment["HF_TOKEN_PATH"] = f"{TOKEN_FOLDER}/token"
    init = container(
        "prepare",
        image,
        ["model", "prepare", *wanted, "--out", PREPARED_FOLDER],
        limits,
        [*mounts, *secrets],
        environment,
    )
    read_only = [{**mount, "readOnly": True} for mount in mounts]
    return ModelFiles(PREPARED_FOLDER, volumes, read_only, [init])


def secret_volume(name: str, secret: SecretKey, path: str) -> dict[str, Any]:
    """A volume with one key of a Secret as file `path`, readable by the pod's group only."""
    items = [{"key": secret.key, "path": path}]
    return {"name": name, "secret": {"secretName": secret.name, "items": items, "defaultMode": 0o440}}


def container(
    name: str,
    image: str,
    args: list[str],
    limits: Mapping[str, Any],
    mounts: list[dict[str, Any]],
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """A container that runs `hat` with `args`."""
    variables = {"HOME": "/tmp", "HF_HOME": "/tmp/huggingface", **environment}  # noqa: S108 (an emptyDir)
    return {
        "name": name,
        "image": image,
        "command": ["hat"],
        "args": args,
        "env": [{"name": key, "value": value} for key, value in variables.items()],
        "resources": dict(limits),
        "securityContext": dict(CONTAINER_SECURITY),
        "volumeMounts": [*mounts, {"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108
    }


def life() -> dict[str, Any]:
    """Start and readiness by /readyz, life by /healthz, on the port named http; and a pause before the end."""
    ready = {"httpGet": {"path": "/readyz", "port": "http"}, "timeoutSeconds": 5}
    alive = {"httpGet": {"path": "/healthz", "port": "http"}, "timeoutSeconds": 5}
    return {
        "startupProbe": {**ready, "periodSeconds": 5, "failureThreshold": START_S // 5},
        "readinessProbe": {**ready, "periodSeconds": 5, "failureThreshold": 3},
        "livenessProbe": {**alive, "periodSeconds": 10, "failureThreshold": 6},
        # A command and not the action `sleep`, which Kubernetes 1.29 does not have.
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(LEAVE_S)]}}},
    }


def tolerations(*wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each toleration once, in order."""
    found: list[dict[str, Any]] = []
    for toleration in wanted:
        if dict(toleration) not in found:
            found.append(dict(toleration))
    return found


def gpu_toleration() -> dict[str, str]:
    """GPU nodes are often tainted so that only pods that ask for a GPU come to them."""
    return {"key": GPU, "operator": "Exists", "effect": "NoSchedule"}


def marks(template: Template, own: Mapping[str, str]) -> dict[str, Any]:
    """Labels and annotations of pods; the operator's own labels come before the user's."""
    found: dict[str, Any] = {"labels": {**template.labels, **own}}
    if template.annotations:
        found["annotations"] = dict(template.annotations)
    return found


def pod_spec(
    hat: HatDeployment,
    service_account: str,
    main: dict[str, Any],
    files: ModelFiles,
    volumes: list[dict[str, Any]],
    template: Template,
) -> dict[str, Any]:
    """A pod by the restricted pod security standard, without a token of the API server."""
    security = {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    spec: dict[str, Any] = {
        "serviceAccountName": service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": LEAVE_S + ANSWER_S + 10,
        "securityContext": security,
        "containers": [main],
        "volumes": [*files.volumes, *volumes, {"name": "tmp", "emptyDir": {}}],
    }
    if files.init:
        spec["initContainers"] = files.init
    if hat.spec.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in hat.spec.pull_secrets]
    if template.priority_class:
        spec["priorityClassName"] = template.priority_class
    return spec
