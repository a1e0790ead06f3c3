"""The devices' side: a DaemonSet for each kind of device, and the Service of their API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hat_operator import names
from hat_operator.identity import who
from hat_operator.objects import identity, pods
from hat_operator.settings import Settings
from hat_operator.spec import Edge, EdgeImage, HatDeployment
from hat_operator.tuning import Chunking, Speculation, Wire

DEFAULT_CPU = "500m"
DEFAULT_MEMORY = "2Gi"
"""Enough for the default model's part; a larger model needs edge.resources."""


def daemonsets(
    hat: HatDeployment,
    edge: Edge,
    settings: Settings,
    revision: str,
    endpoint: str,
    unavailable: Mapping[str, int],
) -> list[dict[str, Any]]:
    """One for each of edge.images; without any, one for all devices.

    Args:
        hat: what is wanted.
        edge: its edge part.
        settings: say where images come from.
        revision: that of the cloud behind `endpoint`.
        endpoint: HOST:PORT that devices dial.
        unavailable: how many devices may be without a ready pod during an update, by the DaemonSet's name.
    """
    images: tuple[EdgeImage | None, ...] = edge.images or (None,)
    found = [_daemonset(hat, edge, settings, revision, endpoint, image) for image in images]
    for daemonset in found:
        most = unavailable.get(daemonset["metadata"]["name"], "10%")
        rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": most}}
        daemonset["spec"]["updateStrategy"] = rolling
    return found


def _daemonset(
    hat: HatDeployment, edge: Edge, settings: Settings, revision: str, endpoint: str, image: EdgeImage | None
) -> dict[str, Any]:
    kind = "cpu" if image is None else image.name
    selector = {**names.selector(hat, names.EDGE), names.LABEL_IMAGE: kind}
    own = {**names.labels(hat, names.EDGE), names.LABEL_IMAGE: kind, names.LABEL_REVISION: revision}
    marks = pods.marks(edge.template, own)
    pod = _pod(hat, edge, settings, endpoint, _image(hat, settings, image))
    pod["nodeSelector"] = _node_selector(edge, image)
    if image is not None and _has_jetson_twin(edge, image):
        unlabelled = {"matchExpressions": [{"key": names.LABEL_L4T, "operator": "DoesNotExist"}]}
        required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [unlabelled]}}
        pod["affinity"] = {"nodeAffinity": required}
    if edge.accelerator == "cuda" and image is not None and image.l4t:
        pod["securityContext"]["supplementalGroups"] = [pods.VIDEO_GROUP]
    metadata = names.metadata(hat, names.EDGE, names.edge_daemonset(hat, kind), names.edge_namespace(hat))
    metadata["labels"] = own
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": metadata,
        "spec": {
            "revisionHistoryLimit": 2,
            "selector": {"matchLabels": selector},
            "template": {"metadata": marks, "spec": pod},
        },
    }


def _image(hat: HatDeployment, settings: Settings, image: EdgeImage | None) -> str:
    tag = names.runtime_version(hat, settings)
    if image is None:
        return settings.image("hat-edge", tag)
    return image.image or settings.image("hat-edge", f"{tag}-l4t-{image.l4t}" if image.l4t else tag)


def _node_selector(edge: Edge, image: EdgeImage | None) -> dict[str, str]:
    found = {**edge.template.node_selector, **edge.match_labels}
    if image is not None:
        found[names.LABEL_ARCH] = image.arch
        if image.l4t:
            found[names.LABEL_L4T] = image.l4t
    return found


def _has_jetson_twin(edge: Edge, image: EdgeImage) -> bool:
    """Whether this image, for any device of its arch, would also come to the Jetsons that another image is for."""
    return not image.l4t and any(other.l4t and other.arch == image.arch for other in edge.images)


def _pod(hat: HatDeployment, edge: Edge, settings: Settings, endpoint: str, image: str) -> dict[str, Any]:
    path = "spec.edge.resources"
    limits = pods.resources(edge.resources, path, DEFAULT_CPU, DEFAULT_MEMORY)
    part = pods.prepared_part(hat, "device")
    files = pods.model_files(hat, hat.spec.device_claim, part, image, limits)
    picospec = hat.spec.mode == "picospec"
    args = ["device", "serve", "--model", files.path, "--cloud", endpoint]
    args += ["--listen", f"0.0.0.0:{names.DEVICE_PORT}"]
    args += [] if picospec else _chunking(hat.spec.chunking)
    args += ["--dtype", hat.spec.model.dtype, "--device", "cpu" if edge.accelerator == "none" else "cuda"]
    if picospec:
        args += ["--mode", "picospec", "--draft-model", files.path, *_speculating(hat.spec.speculation)]
        # Only where it is asked for: the default leaves devices of an earlier version as they are.
        args += [] if edge.offline == "refuse" else ["--offline", edge.offline]
    else:
        args += [*_drafting(hat.spec.speculation), "--uplink-codec", _codecs(hat.spec.wire)]
        args += ["--pad-frames"] if hat.spec.wire.pad_frames else []
    args += ["--model-name", edge.api.model_name or hat.name]
    args += ["--grace", str(pods.ANSWER_S), "--log-format", "json", "--log-level", hat.spec.log_level]
    mounts, volumes = list(files.mounts), []
    if edge.api.keys is not None:
        volumes.append(pods.secret_volume("keys", edge.api.keys, edge.api.keys.key))
        mounts.append({"name": "keys", "mountPath": "/keys", "readOnly": True})
        args += ["--api-key-file", f"/keys/{edge.api.keys.key}"]
    mutual = hat.spec.security.mutual
    if mutual:
        files.init.insert(
            0, identity.sidecar(hat, names.EDGE, image, f"{who.device_prefix(hat, settings)}$(HAT_NODE_NAME)")
        )
        args += ["--tls", identity.FOLDER]
        mounts.append(identity.mount())
        volumes += identity.volumes()
    environment = {} if mutual and edge.api.keys is not None else identity.insecure()
    if edge.accelerator == "cuda":  # no device plugin says which GPU: NVIDIA's runtime reads these
        environment |= {
            "NVIDIA_VISIBLE_DEVICES": "all",
            "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
        }
    gpus = 1 if edge.accelerator == pods.GPU else 0
    main = pods.container(
        "device",
        image,
        args,
        pods.resources(edge.resources, path, DEFAULT_CPU, DEFAULT_MEMORY, gpus),
        mounts,
        environment,
    )
    # The name by which the cloud lists the device, as status.devices does.
    node = {"fieldRef": {"apiVersion": "v1", "fieldPath": "spec.nodeName"}}
    main["env"].append({"name": "HAT_DEVICE_NAME", "valueFrom": node})
    port: dict[str, Any] = {"name": "http", "containerPort": names.DEVICE_PORT, "protocol": "TCP"}
    if edge.api.host_port:
        port["hostPort"] = edge.api.host_port
    main["ports"] = [port]
    main.update(pods.life())
    spec = pods.pod_spec(hat, names.edge(hat), main, files, volumes, edge.template)
    # A device is away at times; its pod must wait for it and not be thrown off the node.
    forever = {"operator": "Exists", "effect": "NoExecute"}
    gpu = [pods.gpu_toleration()] if gpus else []
    spec["tolerations"] = pods.tolerations(forever, *gpu, *edge.template.tolerations)
    if edge.runtime_class:
        spec["runtimeClassName"] = edge.runtime_class
    return spec


def _chunking(wanted: Chunking) -> list[str]:
    if wanted.mode == "fixed":
        return ["--chunk-tokens", str(wanted.tokens)]
    policy = "predictive" if wanted.mode == "auto" else wanted.mode
    bounds = f"{wanted.least}:{wanted.most}"
    return ["--chunk-tokens", "auto", "--chunk-policy", policy, "--chunk-bounds", bounds]


def _drafting(wanted: Speculation) -> list[str]:
    found = ["--drafter", wanted.drafter, "--max-draft", str(wanted.max_draft)]
    found += ["--branches", str(wanted.branches), "--sampler", wanted.sampler]
    if wanted.stop_threshold is not None:
        found += ["--stop-threshold", str(wanted.stop_threshold)]
    if wanted.window is not None:
        found += ["--window", str(wanted.window)]
    if wanted.alternatives is not None:
        found += ["--alternatives", str(wanted.alternatives)]
    return found


def _speculating(wanted: Speculation) -> list[str]:
    """The options that mode picospec has of those."""
    found = ["--max-draft", str(wanted.max_draft), "--sampler", wanted.sampler]
    return found if wanted.window is None else [*found, "--window", str(wanted.window)]


def _codecs(wire: Wire) -> str:
    """PROMPT,DECODE in the runtime's names."""
    return ",".join("raw" if name == "none" else name for name in (wire.uplink, wire.uplink_decode))


def service(hat: HatDeployment, edge: Edge) -> dict[str, Any]:
    """The API of the device that the caller runs on."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": names.metadata(hat, names.EDGE, names.edge(hat), names.edge_namespace(hat)),
        "spec": {
            "type": "ClusterIP",
            "internalTrafficPolicy": "Local",
            "selector": names.selector(hat, names.EDGE),
            "ports": [{"name": "http", "port": edge.api.port, "targetPort": "http", "protocol": "TCP"}],
        },
    }
