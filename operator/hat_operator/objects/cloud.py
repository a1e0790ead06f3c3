"""The cloud's side: Deployment, Service, PodDisruptionBudget and ServiceAccount."""

from __future__ import annotations

from typing import Any

from hat_operator import names
from hat_operator.identity import who
from hat_operator.objects import identity, pods
from hat_operator.objects.replica_files import DENIED, POLICY, QUOTAS
from hat_operator.policy import adaptive
from hat_operator.settings import Settings
from hat_operator.spec import HatDeployment

DEFAULT_CPU = "500m"
DEFAULT_MEMORY = "3Gi"
"""Enough for the default model and 1 GiB of KV cache; a larger model needs cloud.resources."""


def deployment(hat: HatDeployment, settings: Settings, revision: str) -> dict[str, Any]:
    """The replicas of one revision; none while the HatDeployment is suspended."""
    cloud = hat.spec.cloud
    selector = names.selector(hat, names.CLOUD, revision)
    pod = _pod(hat, settings)
    pod["topologySpreadConstraints"] = [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": selector},
        }
    ]
    metadata = names.metadata(hat, names.CLOUD, names.cloud_revision(hat, revision), hat.namespace)
    metadata["labels"][names.LABEL_REVISION] = revision
    marks = pods.marks(cloud.template, metadata["labels"])
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": {
            "replicas": 0 if hat.spec.suspend else cloud.replicas,
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": 2 * pods.START_S,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "selector": {"matchLabels": selector},
            "template": {"metadata": marks, "spec": pod},
        },
    }


def _pod(hat: HatDeployment, settings: Settings) -> dict[str, Any]:
    cloud = hat.spec.cloud
    image = cloud.image or settings.image("hat-cloud", names.runtime_version(hat, settings))
    path = "spec.cloud.resources"
    limits = pods.resources(cloud.resources, path, DEFAULT_CPU, DEFAULT_MEMORY)
    files = pods.model_files(hat, hat.spec.model.claim, pods.prepared_part(hat, "cloud"), image, limits)
    layers = hat.spec.input_layers
    args = ["cloud", "serve", "--model", files.path]
    args += ["--mode", "picospec"] if layers is None else ["--input-layers", str(layers)]
    args += ["--listen", f"0.0.0.0:{names.GRPC_PORT}", "--http-listen", f"0.0.0.0:{names.HTTP_PORT}"]
    args += ["--dtype", hat.spec.model.dtype, "--max-sessions", str(cloud.max_sessions)]
    args += [] if cloud.resume_ttl_s is None else ["--resume-ttl", str(cloud.resume_ttl_s)]
    args += ["--device", "cuda" if cloud.gpus else "cpu"]
    proposes = adaptive(hat.spec.mode, hat.spec.chunking)
    args += ["--policy-file", POLICY.path] if proposes else []
    limited = cloud.quotas is not None
    args += ["--quotas", QUOTAS.path] if limited else []
    mutual = hat.spec.security.mutual
    if mutual:
        args += ["--tls", identity.FOLDER, "--admin-listen", f"0.0.0.0:{names.ADMIN_PORT}"]
        args += ["--denied-file", DENIED.path]
    args += ["--log-format", "json", "--log-level", hat.spec.log_level]
    mounts = [*files.mounts, *([POLICY.mount()] if proposes else [])]
    mounts += [QUOTAS.mount()] if limited else []
    mounts += [identity.mount(), DENIED.mount()] if mutual else []
    main = pods.container(
        "cloud",
        image,
        args,
        pods.resources(cloud.resources, path, DEFAULT_CPU, DEFAULT_MEMORY, cloud.gpus),
        mounts,
        {} if mutual else identity.insecure(),
    )
    main["ports"] = [
        {"name": "grpc", "containerPort": names.GRPC_PORT, "protocol": "TCP"},
        {"name": "http", "containerPort": names.HTTP_PORT, "protocol": "TCP"},
    ]
    if mutual:
        main["ports"].append({"name": names.ADMIN, "containerPort": names.ADMIN_PORT, "protocol": "TCP"})
    main.update(pods.life())
    volumes = [POLICY.volume(hat)] if proposes else []
    volumes += [QUOTAS.volume(hat)] if limited else []
    if mutual:
        own = str(who.cloud(hat, settings))
        files.init.insert(0, identity.sidecar(hat, names.CLOUD, image, own))
        volumes += [*identity.volumes(), DENIED.volume(hat)]
    spec = pods.pod_spec(hat, names.cloud(hat), main, files, volumes, cloud.template)
    if cloud.template.node_selector:
        spec["nodeSelector"] = dict(cloud.template.node_selector)
    if cloud.runtime_class:
        spec["runtimeClassName"] = cloud.runtime_class
    gpu = [pods.gpu_toleration()] if cloud.gpus else []
    tolerated = pods.tolerations(*gpu, *cloud.template.tolerations)
    if tolerated:
        spec["tolerations"] = tolerated
    return spec


def service(hat: HatDeployment, revision: str) -> dict[str, Any]:
    """The replicas of the revision that serves, exposed as cloud.expose says."""
    found = _service(hat, names.cloud(hat), revision)
    if hat.spec.cloud.expose.node_port:
        found["spec"]["ports"][0]["nodePort"] = hat.spec.cloud.expose.node_port
    return found


def revision_service(hat: HatDeployment, revision: str) -> dict[str, Any]:
    """What the devices of one revision dial, where names.endpoint_per_revision; it lives as long as its Deployment."""
    found = _service(hat, names.cloud_revision(hat, revision), revision)
    found["metadata"]["labels"][names.LABEL_REVISION] = revision
    if not hat.spec.cloud.expose.host:
        # Dialled by its name in the cluster; what cloud.expose asks for besides is done by the other Service.
        found["spec"]["type"] = "ClusterIP"
    return found


def _service(hat: HatDeployment, name: str, revision: str) -> dict[str, Any]:
    expose = hat.spec.cloud.expose
    port = {"name": "grpc", "port": expose.port, "targetPort": "grpc", "protocol": "TCP"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": names.metadata(hat, names.CLOUD, name, hat.namespace),
        "spec": {
            "type": expose.type,
            "selector": names.selector(hat, names.CLOUD, revision),
            "ports": [port],
        },
    }


def disruption_budget(hat: HatDeployment) -> dict[str, Any]:
    """One replica at a time: a minimum would keep a node with the only replica from being drained."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": names.metadata(hat, names.CLOUD, names.cloud(hat), hat.namespace),
        "spec": {
            "maxUnavailable": 1,
            "selector": {"matchLabels": names.selector(hat, names.CLOUD)},
        },
    }


def service_account(hat: HatDeployment, component: str, name: str, namespace: str) -> dict[str, Any]:
    """An account whose token only the container gets that asks for certificates."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": names.metadata(hat, component, name, namespace),
        "automountServiceAccountToken": False,
    }
