"""A HatDeployment as the API server hands it out, with all defaults, in frozen dataclasses.

The fields' meaning is in the CRD (crds/hat.dev_hatdeployments.yaml) and only there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hat_operator.fields import Fields, SpecError
from hat_operator.prometheus_ref import Prometheus
from hat_operator.quotas import quota_file
from hat_operator.sources import Claim, SecretKey, Source
from hat_operator.tuning import Chunking, Speculation, Wire

__all__ = ["HatDeployment", "SecretKey", "SpecError"]

Quantities = Mapping[str, str | int]


@dataclass(frozen=True)
class Model:
    """Which model; exactly one of hub and claim is set."""

    hub: str | None
    claim: Claim | None
    token: SecretKey | None
    revision: str
    dtype: str


@dataclass(frozen=True)
class Resources:
    """Quantities as they were written."""

    requests: Quantities
    limits: Quantities


@dataclass(frozen=True)
class Template:
    """How pods are scheduled and marked."""

    node_selector: Mapping[str, str]
    tolerations: tuple[Mapping[str, Any], ...]
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    priority_class: str


@dataclass(frozen=True)
class Expose:
    """How devices reach the cloud; host "" and node_port 0 mean that the cluster decides."""

    type: str
    host: str
    port: int
    node_port: int


@dataclass(frozen=True)
class Cloud:
    """The replicas with the middle layers, or with all of them."""

    replicas: int
    gpus: int
    runtime_class: str
    """"" for the cluster's own."""
    resources: Resources
    max_sessions: int
    resume_ttl_s: int | None
    """None: the runtime's own."""
    quotas: str | None
    """A quota file in JSON; None: there is none, and nobody is limited."""
    image: str
    expose: Expose
    template: Template


@dataclass(frozen=True)
class ClusterRef:
    """The devices' own cluster; context "" is the kubeconfig's current one."""

    kubeconfig: SecretKey
    context: str
    namespace: str


@dataclass(frozen=True)
class EdgeImage:
    """One kind of device; l4t and image may be ""."""

    name: str
    l4t: str
    arch: str
    image: str


@dataclass(frozen=True)
class Api:
    """The API that each device serves; host_port 0 is none."""

    port: int
    host_port: int
    model_name: str
    keys: SecretKey | None


@dataclass(frozen=True)
class Edge:
    """The devices' side."""

    cluster: ClusterRef | None
    match_labels: Mapping[str, str]
    images: tuple[EdgeImage, ...]
    runtime_class: str
    accelerator: str
    resources: Resources
    api: Api
    weights: Claim | None
    template: Template
    offline: str
    """What devices do while the cloud is away: refuse or draft-only."""
    deletion_timeout_s: int


@dataclass(frozen=True)
class Security:
    """What surrounds the pods."""

    network_policies: bool
    tls: str
    """mutual or off; "" until the operator wrote one of them there."""
    certificate_hours: int
    denied: frozenset[str]
    """Devices that the cloud is to refuse."""

    @property
    def mutual(self) -> bool:
        """Whether both sides show certificates."""
        return self.tls != "off"


@dataclass(frozen=True)
class Spec:
    """What is wanted."""

    mode: str
    suspend: bool
    model: Model
    input_layers: int | None
    """None in mode picospec, which cuts no model."""
    version: str
    """runtime.version; "" until the operator wrote its own there."""
    cloud: Cloud
    edge: Edge | None
    speculation: Speculation
    chunking: Chunking
    wire: Wire
    pull_secrets: tuple[str, ...]
    security: Security
    log_level: str
    pod_monitor: str
    prometheus: Prometheus | None
    """Whom the operator asks for figures; None: the cloud's pods."""

    @property
    def edge_cluster(self) -> ClusterRef | None:
        """The devices' own cluster; None where they are in this one, or there are none."""
        return None if self.edge is None else self.edge.cluster

    @property
    def device_claim(self) -> Claim | None:
        """Where what the devices run lies ready; None where they fetch it, or there are none."""
        if self.mode == "picospec":
            draft = self.speculation.draft_model
            return None if draft is None else draft.claim
        return None if self.edge is None else self.edge.weights


@dataclass(frozen=True)
class HatDeployment:
    """One object of the API."""

    name: str
    namespace: str
    uid: str
    """"" for one that no cluster knows."""
    generation: int
    deleting: bool
    finalizers: tuple[str, ...]
    spec: Spec

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> HatDeployment:
        """Read a defaulted object.

        Raises:
            SpecError: a field is missing, has the wrong type, or contradicts another.
        """
        root = Fields(body, "")
        meta = root.sub("metadata")
        return cls(
            name=meta.text("name"),
            namespace=meta.text("namespace", "default"),
            uid=meta.text("uid", ""),
            generation=meta.number("generation", 0),
            deleting=meta.has("deletionTimestamp"),
            finalizers=tuple(meta.texts("finalizers")),
            spec=_spec(root.sub("spec")),
        )


def _spec(spec: Fields) -> Spec:
    edge = spec.optional("edge")
    mode = spec.text("mode")
    parsed = Spec(
        mode=mode,
        suspend=spec.flag("suspend"),
        model=_model(spec.sub("model")),
        input_layers=None if mode == "picospec" else spec.sub("split").number("inputLayers"),
        version=spec.sub("runtime").text("version"),
        cloud=_cloud(spec.sub("cloud")),
        edge=None if edge is None else _edge(edge),
        speculation=Speculation.parse(spec.sub("speculation"), mode),
        chunking=Chunking.parse(spec.sub("chunking")),
        wire=Wire.parse(spec.sub("wire")),
        pull_secrets=tuple(item.text("name") for item in spec.items("imagePullSecrets")),
        security=_security(spec.sub("security")),
        log_level=spec.sub("observability").text("logLevel"),
        pod_monitor=spec.sub("observability").text("podMonitor"),
        prometheus=Prometheus.parse(spec.sub("observability")),
    )
    if parsed.edge is not None:
        _check_devices_model(parsed, parsed.edge)
    return parsed


def _security(security: Fields) -> Security:
    return Security(
        network_policies=security.flag("networkPolicies"),
        tls=security.text("tls"),
        certificate_hours=security.number("certificateHours"),
        denied=frozenset(security.texts("deniedDevices")),
    )


def _check_devices_model(spec: Spec, edge: Edge) -> None:
    if spec.mode == "picospec":
        if spec.speculation.draft_model is None and spec.model.hub != "default":
            reason = "HAT brings a draft model for hub: default only; name a small model with this tokenizer"
            raise SpecError("spec.speculation.draftModel", None, reason)
    elif spec.model.claim is not None and edge.weights is None:
        reason = "model.source.claim exists only in the cloud's namespace; name the edge side's claim"
        raise SpecError("spec.edge.weights", None, reason)


def _model(model: Fields) -> Model:
    source = Source.parse(model.sub("source"))
    return Model(
        hub=source.hub,
        claim=source.claim,
        token=_secret(model.optional("tokenSecretRef")),
        revision=model.text("revision"),
        dtype=model.text("dtype"),
    )


def _cloud(cloud: Fields) -> Cloud:
    expose = cloud.sub("expose")
    quotas = cloud.optional("quotas")
    return Cloud(
        replicas=cloud.number("replicas"),
        gpus=cloud.sub("accelerator").number("count"),
        runtime_class=cloud.text("runtimeClassName"),
        resources=_resources(cloud.optional("resources")),
        max_sessions=cloud.number("maxSessions"),
        resume_ttl_s=cloud.number("resumeTtlSeconds") if cloud.has("resumeTtlSeconds") else None,
        quotas=None if quotas is None else quota_file(quotas),
        image=cloud.text("image"),
        expose=Expose(
            expose.text("type"), expose.text("host"), expose.number("port"), expose.number("nodePort")
        ),
        template=_template(cloud.sub("template")),
    )


def _edge(edge: Fields) -> Edge:
    images = tuple(
        EdgeImage(item.text("name"), item.text("l4t"), item.text("arch"), item.text("image"))
        for item in edge.items("images")
    )
    for index, image in enumerate(images):
        if any((other.arch, other.l4t) == (image.arch, image.l4t) for other in images[:index]):
            reason = "another image is for the same arch and l4t; a device would run both"
            raise SpecError(f"spec.edge.images[{index}]", image.name, reason)
    api = edge.sub("api")
    weights = edge.optional("weights")
    return Edge(
        cluster=_cluster(edge.optional("clusterRef")),
        match_labels=edge.sub("deviceSelector").labels("matchLabels"),
        images=images,
        runtime_class=edge.text("runtimeClassName"),
        accelerator=edge.sub("accelerator").text("type"),
        resources=_resources(edge.optional("resources")),
        api=Api(
            port=api.number("port"),
            host_port=api.number("hostPort"),
            model_name=api.text("modelName"),
            keys=_secret(api.optional("keySecretRef")),
        ),
        weights=None if weights is None else Claim.parse(weights.sub("claim")),
        template=_template(edge.sub("template")),
        offline=edge.text("offline", "refuse"),
        deletion_timeout_s=edge.number("deletionTimeoutSeconds"),
    )


def _cluster(cluster: Fields | None) -> ClusterRef | None:
    if cluster is None:
        return None
    kubeconfig = cluster.sub("kubeconfigSecretRef")
    return ClusterRef(
        kubeconfig=SecretKey(kubeconfig.text("name"), kubeconfig.text("key")),
        context=kubeconfig.text("context"),
        namespace=cluster.text("namespace"),
    )


def _secret(secret: Fields | None) -> SecretKey | None:
    return None if secret is None else SecretKey.parse(secret)


def _resources(resources: Fields | None) -> Resources:
    if resources is None:
        return Resources({}, {})
    return Resources(resources.mapping("requests"), resources.mapping("limits"))


def _template(template: Fields) -> Template:
    return Template(
        node_selector=template.labels("nodeSelector"),
        tolerations=tuple(item.value for item in template.items("tolerations")),
        labels=template.labels("labels"),
        annotations=template.labels("annotations"),
        priority_class=template.text("priorityClassName", ""),
    )
